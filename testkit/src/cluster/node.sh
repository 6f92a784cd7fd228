# The first process of a node, in namespaces of its own (mount, UTS, IPC, PID, cgroup): it makes the node's file system,
# moves into it, and then only reaps. See node.rs.
set -eu
lower=$1 data=$2 programs=$3 name=$4
root=$data/root

hostname "$name"
mount --make-rprivate /
mkdir -p "$data"/{upper,work,root,containerd,kubelet,sysctl}
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$data/upper,workdir=$data/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs tmp "$root/tmp"

mount -t tmpfs -o mode=755 dev "$root/dev"
for device in null zero full random urandom tty kmsg net/tun; do
    mkdir -p "$(dirname "$root/dev/$device")"
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root"/dev/{pts,shm,mqueue}
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount -t tmpfs shm "$root/dev/shm"
mount -t mqueue mqueue "$root/dev/mqueue"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"

mount -t tmpfs -o mode=755 cgroup "$root/sys/fs/cgroup"
# Those of version 1: a hierarchy has several controllers, or a name.
while IFS=: read -r number controllers _; do
    case $number:$controllers in
        0:*) continue ;;
        *:name=*) folder=${controllers#name=} options=none,$controllers ;;
        *) folder=$controllers options=$controllers ;;
    esac
    mkdir "$root/sys/fs/cgroup/$folder"
    mount -t cgroup -o "$options" cgroup "$root/sys/fs/cgroup/$folder"
done </proc/self/cgroup

# The kubelet sets these for the whole machine.
for sysctl in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    [ -e "/proc/sys/$sysctl" ] || continue
    copy=$data/sysctl/${sysctl//\//.}
    cat "/proc/sys/$sysctl" >"$copy"
    mount --bind "$copy" "$root/proc/sys/$sysctl"
done

# The file systems of containers cannot lie on an overlay.
mkdir -p "$root"/{var/lib/containerd,var/lib/kubelet,opt/programs,opt/cni/bin,etc/kubernetes,etc/cni/net.d}
mount --bind "$data/containerd" "$root/var/lib/containerd"
mount --bind "$data/kubelet" "$root/var/lib/kubelet"
mount --bind "$programs" "$root/opt/programs"
mount -o remount,bind,ro "$root/opt/programs"
mount --bind "$data/etc" "$root/etc/kubernetes"
cp "$programs"/cni-1.9.1/* "$root/opt/cni/bin"

# A command of the node belongs to its control groups.
cat >"$root/run/enter" <<'ENTER'
#!/bin/sh
for group in /sys/fs/cgroup/*/; do echo $$ >"$group/cgroup.procs"; done
exec "$@"
ENTER
chmod +x "$root/run/enter"

cd "$root"
mkdir -p old
pivot_root . old
umount -l /old
mount --make-rshared /
touch /run/started
while :; do sleep 3600 & wait $! || :; done
