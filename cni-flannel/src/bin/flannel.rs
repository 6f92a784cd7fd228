//! The plug-in `flannel`.

fn main() -> std::process::ExitCode {
    cni_flannel::main()
}
