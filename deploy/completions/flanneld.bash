# Made from flanneld's tables of flags and commands (flanneld/src/packaging.rs). Do not edit.

_flanneld() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD - 1]}" word command=
    # The shell splits -name=value into three words.
    if [[ $current == = ]]; then
        current=
    elif [[ $previous == = ]]; then
        previous="${COMP_WORDS[COMP_CWORD - 2]}"
    fi
    COMPREPLY=()
    case "${previous/#--/-}" in
        -etcd-cafile|-etcd-certfile|-etcd-keyfile|-etcd-password-file|-kubeconfig-file|-net-config-path|-state-file|-subnet-file|-cni-plugin|-cni-conf) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;
        -subnet-dir|-cni-bin-dir|-cni-conf-dir) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$current"); return ;;
        -on-lease-loss) COMPREPLY=($(compgen -W "reacquire keep stop" -- "$current")); return ;;
        -on-config-change) COMPREPLY=($(compgen -W "keep restart" -- "$current")); return ;;
        -log-format) COMPREPLY=($(compgen -W "text json" -- "$current")); return ;;
        -o) COMPREPLY=($(compgen -W "table wide json" -- "$current")); return ;;
        -etcd-endpoints|-etcd-prefix|-etcd-username|-etcd-password|-kube-api-url|-kube-annotation-prefix|-iface|-iface-regex|-iface-can-reach|-public-ip|-public-ipv6|-node-name|-overlay-name|-subnet-lease-ttl|-iptables-resync|-audit-interval|-metrics-ip|-metrics-port|-healthz-ip|-healthz-port|-v|-subnet-lease-renew-margin|-vmodule|-log_backtrace_at) :; return ;;
        help) COMPREPLY=($(compgen -W "status peers plan explain doctor cleanup version help" -- "$current")); return ;;
    esac
    for word in "${COMP_WORDS[@]:1:COMP_CWORD - 1}"; do
        case "$word" in
            status|peers|plan|explain|doctor|cleanup|version|help) command="$word"; break ;;
        esac
    done
    if [[ $current != -* ]]; then
        [[ -n $command ]] || COMPREPLY=($(compgen -W "status peers plan explain doctor cleanup version help" -- "$current"))
        return
    fi
    local flags="-etcd-endpoints -etcd-prefix -etcd-cafile -etcd-certfile -etcd-keyfile -etcd-username -etcd-password -etcd-password-file -etcd-allow-clear-text-credentials -kube-subnet-mgr -kube-api-url -kubeconfig-file -kube-annotation-prefix -net-config-path -set-node-network-unavailable -iface -iface-regex -iface-can-reach -public-ip -public-ipv6 -subnet-dir -node-name -overlay-name -subnet-lease-ttl -state-file -subnet-file -on-lease-loss -on-config-change -ip-masq -ip-masq-fully-random-disable -iptables-forward-rules -iptables-resync -vxlan-guard -ip-blackhole-route -audit-interval -keep-capabilities -cni-bin-dir -cni-plugin -cni-conf-dir -cni-conf -metrics-ip -metrics-port -healthz-ip -healthz-port -v -log-format -version -subnet-lease-renew-margin -vmodule -log_backtrace_at"
    case "$command" in
        status) flags+=" -o -json -w -watch" ;;
        peers) flags+=" -o -json -w -watch" ;;
        plan) flags+=" -o -json" ;;
        explain) flags+=" -o -json" ;;
        doctor) flags+=" -o -json" ;;
        cleanup) flags+=" -dry-run -force" ;;
        version) flags+=" -o -json" ;;
    esac
    COMPREPLY=($(compgen -W "$flags" -- "$current"))
}

complete -F _flanneld flanneld
