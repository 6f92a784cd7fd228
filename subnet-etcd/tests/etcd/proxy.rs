//! A TCP proxy that loses answers, holds them back, or passes them on in small pieces.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The largest piece that is passed on.
const LARGEST: usize = 65_536;

/// A proxy before a member; ends when its handle is dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    /// Incremented to cut all connections.
    cuts: watch::Sender<u32>,
    gate: Arc<Gate>,
    task: JoinHandle<()>,
}

struct Gate {
    /// How many pieces of answers still pass; unlimited below zero.
    left: AtomicI64,
    /// 1: new connections are refused.
    shut: AtomicI64,
    /// 1: the loss of an answer also refuses new connections.
    shuts: AtomicI64,
    /// The largest piece of an answer that is passed on.
    most: AtomicUsize,
    /// Whether answers are held back for now.
    held: watch::Sender<bool>,
}

impl Proxy {
    pub(crate) async fn start(target: &str) -> Self {
        let target = target.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cuts, cut) = watch::channel(0);
        let gate = Arc::new(Gate {
            left: AtomicI64::new(-1),
            shut: AtomicI64::new(0),
            shuts: AtomicI64::new(0),
            most: AtomicUsize::new(LARGEST),
            held: watch::Sender::new(false),
        });
        let shared = Arc::clone(&gate);
        let task = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                if shared.shut.load(Ordering::SeqCst) == 0 {
                    let Ok(server) = TcpStream::connect(&target).await else { continue };
                    tokio::spawn(forward(client, server, Arc::clone(&shared), cut.clone()));
                }
            }
        });
        Self { address, cuts, gate, task }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets this many pieces of answers pass, then drops the rest of that connection's answers and closes it. Later
    /// connections work.
    pub(crate) fn lose_after(&self, pieces: i64) {
        self.gate.left.store(pieces, Ordering::SeqCst);
    }

    /// The same, and refuses new connections: the client cannot ask whether the request was carried out.
    pub(crate) fn shut_after(&self, pieces: i64) {
        self.gate.shuts.store(1, Ordering::SeqCst);
        self.lose_after(pieces);
    }

    /// Whether the loss has happened.
    pub(crate) fn has_lost(&self) -> bool {
        self.gate.left.load(Ordering::SeqCst) < 0
    }

    /// Passes answers on in pieces of this many bytes.
    pub(crate) fn trickle(&self, bytes: usize) {
        self.gate.most.store(bytes, Ordering::SeqCst);
    }

    /// Holds back all answers until [`let_go`](Self::let_go); connections stay open.
    pub(crate) fn hold(&self) {
        self.gate.held.send_replace(true);
    }

    pub(crate) fn let_go(&self) {
        self.gate.held.send_replace(false);
    }

    /// Closes all connections and refuses new ones until [`open`](Self::open).
    pub(crate) fn shut(&self) {
        self.gate.shut.store(1, Ordering::SeqCst);
        self.cuts.send_modify(|count| *count += 1);
    }

    pub(crate) fn open(&self) {
        self.gate.shut.store(0, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.cuts.send_modify(|count| *count += 1);
    }
}

async fn forward(client: TcpStream, server: TcpStream, gate: Arc<Gate>, mut cut: watch::Receiver<u32>) {
    cut.mark_unchanged();
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let requests = async { tokio::io::copy(&mut from_client, &mut to_server).await.map(drop) };
    let answers = async {
        let (mut buffer, mut held) = (vec![0; LARGEST], gate.held.subscribe());
        loop {
            let most = gate.most.load(Ordering::SeqCst);
            let read = from_server.read(&mut buffer[..most]).await?;
            // Fails if the gate is gone, and its holder with it.
            let _ = held.wait_for(|held| !held).await;
            if read == 0 {
                return Ok(());
            }
            match gate.left.load(Ordering::SeqCst) {
                0 => {
                    gate.left.store(-1, Ordering::SeqCst);
                    gate.shut.store(gate.shuts.load(Ordering::SeqCst), Ordering::SeqCst);
                    // Meanwhile the server carries out the request.
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    return Ok::<_, std::io::Error>(());
                }
                left if left > 0 => gate.left.store(left - 1, Ordering::SeqCst),
                _ => {}
            }
            to_client.write_all(&buffer[..read]).await?;
        }
    };
    tokio::select! {
        _ = requests => {}
        _ = answers => {}
        _ = cut.changed() => {}
    }
}
