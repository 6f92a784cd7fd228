//! A network namespace for one unit test.

/// Runs `test` on a thread in a network namespace of its own, which ends with the thread.
pub(crate) fn in_new_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let in_namespace = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("this test needs CAP_SYS_ADMIN: run it as root or under unshare -Urn");
        test()
    };
    match std::thread::scope(|scope| scope.spawn(in_namespace).join()) {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
