//! A guest's socket layer on top of the driver: listens, accepts, keeps credit.

use std::collections::{BTreeMap, HashSet, VecDeque};

use super::driver::*;

/// One of the guest's sockets.
pub(crate) struct Socket {
    pub(crate) host_port: u32,
    pub(crate) guest_port: u32,
    pub(crate) established: bool,
    /// Bytes received, in order.
    pub(crate) inbox: Vec<u8>,
    /// Bytes of `inbox` that the program has read.
    pub(crate) read: usize,
    /// Reads everything at once.
    pub(crate) greedy: bool,
    pub(crate) buf_alloc: u32,
    pub(crate) outbox: VecDeque<u8>,
    sent: u32,
    peer_alloc: u32,
    peer_fwd: u32,
    /// Flags of the shutdowns that the host sent.
    pub(crate) peer_shut: u32,
    /// Flags to send once the outbox is empty.
    pub(crate) shut: u32,
    shut_sent: u32,
    pub(crate) reset: bool,
    pub(crate) credit_requests: u32,
    pub(crate) credit_updates: u32,
}

impl Socket {
    fn new(guest_port: u32, host_port: u32) -> Socket {
        Socket {
            host_port,
            guest_port,
            established: false,
            inbox: Vec::new(),
            read: 0,
            greedy: true,
            buf_alloc: 256 << 10,
            outbox: VecDeque::new(),
            sent: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            peer_shut: 0,
            shut: 0,
            shut_sent: 0,
            reset: false,
            credit_requests: 0,
            credit_updates: 0,
        }
    }

    fn packet(&self, op: u16) -> Packet {
        let mut packet = Packet::new(self.guest_port, self.host_port, op);
        packet.buf_alloc = self.buf_alloc;
        packet.fwd_cnt = u32::try_from(self.read).unwrap();
        packet
    }
}

/// Key: guest port, host port.
pub(crate) type Key = (u32, u32);

pub(crate) struct Guest {
    pub(crate) driver: Driver,
    /// Ports on which connections are accepted.
    pub(crate) listening: HashSet<u32>,
    pub(crate) sockets: BTreeMap<Key, Socket>,
    /// Packets for nobody, resets of closed sockets among them.
    pub(crate) strays: Vec<Packet>,
    pub(crate) echo: bool,
    answers: VecDeque<Packet>,
    next_port: u32,
}

impl Guest {
    pub(crate) fn new(driver: Driver) -> Guest {
        Guest {
            driver,
            listening: HashSet::new(),
            sockets: BTreeMap::new(),
            strays: Vec::new(),
            echo: false,
            answers: VecDeque::new(),
            next_port: 50_000,
        }
    }

    pub(crate) fn socket(&mut self, key: Key) -> &mut Socket {
        self.sockets.get_mut(&key).expect("no such socket")
    }

    /// The only socket there is on a guest port.
    pub(crate) fn on_port(&self, port: u32) -> Option<Key> {
        self.sockets.keys().find(|key| key.0 == port).copied()
    }

    /// Begins to connect to a host port.
    pub(crate) fn connect(&mut self, host_port: u32) -> Key {
        self.next_port += 1;
        let socket = Socket::new(self.next_port, host_port);
        self.answers.push_back(socket.packet(REQUEST));
        let key = (self.next_port, host_port);
        self.sockets.insert(key, socket);
        key
    }

    /// Does everything that can be done now.
    pub(crate) fn turn(&mut self) {
        for (packet, data) in self.driver.receive() {
            self.packet(packet, &data);
        }
        while let Some(packet) = self.answers.front() {
            if !self.driver.send(*packet, &[]) {
                return;
            }
            self.answers.pop_front();
        }
        for socket in self.sockets.values_mut() {
            if self.echo && socket.established {
                let new = socket.inbox.split_off(socket.inbox.len().min(socket.read));
                socket.read += new.len();
                socket.outbox.extend(&new);
                socket.inbox.extend(new);
                if socket.peer_shut & 2 != 0 {
                    socket.shut |= 2;
                }
            } else if socket.greedy {
                socket.read = socket.inbox.len();
            }
            while Self::push(socket, &mut self.driver) {}
        }
    }

    /// Sends one packet of a socket's; false when it has to wait.
    fn push(socket: &mut Socket, driver: &mut Driver) -> bool {
        if !socket.established || socket.reset {
            return false;
        }
        if socket.outbox.is_empty() {
            if socket.shut & !socket.shut_sent == 0 {
                return false;
            }
            let mut packet = socket.packet(SHUTDOWN);
            packet.flags = socket.shut;
            let sent = driver.send(packet, &[]);
            if sent {
                socket.shut_sent = socket.shut;
            }
            return sent;
        }
        let free = socket
            .peer_alloc
            .saturating_sub(socket.sent.wrapping_sub(socket.peer_fwd));
        let len = usize::try_from(free.min(TX_BUFFER))
            .unwrap()
            .min(socket.outbox.len());
        if len == 0 {
            return false;
        }
        let data: Vec<u8> = socket.outbox.iter().take(len).copied().collect();
        if !driver.send(socket.packet(RW), &data) {
            return false;
        }
        socket.outbox.drain(..len);
        socket.sent = socket.sent.wrapping_add(u32::try_from(len).unwrap());
        true
    }

    fn packet(&mut self, packet: Packet, data: &[u8]) {
        assert_eq!((packet.src_cid, packet.dst_cid), (2, GUEST_CID));
        let key = (packet.dst_port, packet.src_port);
        if packet.op == REQUEST {
            assert!(!self.sockets.contains_key(&key), "{key:?} twice");
            let mut socket = Socket::new(key.0, key.1);
            socket.peer_alloc = packet.buf_alloc;
            if self.listening.contains(&key.0) {
                socket.established = true;
                self.answers.push_back(socket.packet(RESPONSE));
                self.sockets.insert(key, socket);
            } else {
                self.answers.push_back(socket.packet(RST));
            }
            return;
        }
        let Some(socket) = self.sockets.get_mut(&key).filter(|s| !s.reset) else {
            if packet.op != RST {
                self.answers.push_back(Packet::new(key.0, key.1, RST));
            }
            self.strays.push(packet);
            return;
        };
        assert_eq!(packet.kind, 1);
        socket.peer_alloc = packet.buf_alloc;
        socket.peer_fwd = packet.fwd_cnt;
        match packet.op {
            RESPONSE => socket.established = true,
            RST => socket.reset = true,
            RW => {
                socket.inbox.extend(data);
                let held = socket.inbox.len() - socket.read;
                assert!(
                    held <= usize::try_from(socket.buf_alloc).unwrap(),
                    "the device sent more than there is room for"
                );
            }
            SHUTDOWN => socket.peer_shut |= packet.flags,
            CREDIT_REQUEST => {
                socket.credit_requests += 1;
                self.answers.push_back(socket.packet(CREDIT_UPDATE));
            }
            CREDIT_UPDATE => socket.credit_updates += 1,
            op => panic!("the device sent operation {op}"),
        }
    }

    /// Says that the program has read what it has.
    pub(crate) fn read_all(&mut self, key: Key) {
        let socket = self.socket(key);
        socket.read = socket.inbox.len();
        let packet = socket.packet(CREDIT_UPDATE);
        self.answers.push_back(packet);
    }

    /// Sends a control packet of a socket's.
    pub(crate) fn post(&mut self, key: Key, op: u16) {
        let packet = self.socket(key).packet(op);
        self.answers.push_back(packet);
    }
}
