//! The end that asks.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::Figure;
use crate::start::percentile;

const PORT: u16 = 5000;
/// How long an answer is waited for before the question is taken for lost.
const LOST: Duration = Duration::from_secs(1);
/// How long who has just been started is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the stream that says how long one should be.
const TRIAL: u64 = 4 << 20;
const PIECE: usize = 64 << 10;
const DATAGRAM: [u8; 1400] = [7; 1400];
/// For what is in flight to arrive.
const SETTLE: Duration = Duration::from_millis(300);
const MIB: f64 = (1 << 20) as f64;

/// How it is measured.
#[derive(Debug)]
pub(super) struct Probe {
    /// For each figure.
    pub(super) seconds: Duration,
}

fn at(address: Ipv4Addr) -> SocketAddrV4 {
    SocketAddrV4::new(address, PORT)
}

/// Waits for one that has just been started.
pub(super) fn until_it_answers(address: Ipv4Addr) -> Result<()> {
    let begun = Instant::now();
    while TcpStream::connect_timeout(&at(address).into(), LOST).is_err() {
        ensure!(
            begun.elapsed() < PATIENCE,
            "it does not answer at {address}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

impl Probe {
    pub(super) fn measure(&self, figure: Figure, address: Ipv4Addr) -> Result<f64> {
        match figure {
            Figure::Ping => self.ping(address),
            Figure::UdpEcho => self.udp_echo(address),
            Figure::TcpEcho => self.tcp_echo(address),
            Figure::Connect => self.times(|| {
                let mut stream = connect(address, b'e')?;
                echo(&mut stream)?;
                Ok(true)
            }),
            Figure::TcpTo => self.stream(address, b't'),
            Figure::TcpFrom => self.stream(address, b'f'),
            Figure::UdpTo => self.flood(address),
        }
    }

    /// The median of what `act` takes, microseconds; false is a try that does not count.
    fn times(&self, mut act: impl FnMut() -> Result<bool>) -> Result<f64> {
        let begun = Instant::now();
        let (mut times, mut lost) = (Vec::new(), 0);
        while begun.elapsed() < self.seconds {
            let start = Instant::now();
            match act()? {
                true => times.push(start.elapsed().as_secs_f64() * 1e6),
                false => lost += 1,
            }
        }
        ensure!(
            times.len() > 10 * lost,
            "{lost} of {} were lost",
            times.len() + lost
        );
        times.sort_by(f64::total_cmp);
        Ok(percentile(&times, 50))
    }

    fn ping(&self, address: Ipv4Addr) -> Result<f64> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let icmp = SockProtocol::Icmp;
        let sock = socket(AddressFamily::Inet, SockType::Raw, flags, icmp).context("a socket")?;
        // What a socket is connected to, and what it sends, is the same for both.
        let sock = UdpSocket::from(sock);
        sock.connect((address, 0)).context("connect")?;
        sock.set_read_timeout(Some(LOST)).context("set a limit")?;
        let id = u16::try_from(std::process::id() & 0xffff)?;
        let mut sequence = 0u16;
        self.times(|| {
            sequence = sequence.wrapping_add(1);
            // RFC 792: echo, code 0, checksum, identifier, sequence number.
            let mut packet = [8, 0, 0, 0, 0, 0, 0, 0];
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[6..].copy_from_slice(&sequence.to_be_bytes());
            let sum = packet.as_chunks::<2>().0.iter();
            let sum: u32 = sum.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
            let folded = u16::try_from((sum & 0xffff) + (sum >> 16))?;
            packet[2..4].copy_from_slice(&(!folded).to_be_bytes());
            sock.send(&packet)?;
            let mut answer = [0; 128];
            loop {
                let Ok(len) = sock.recv(&mut answer) else {
                    return Ok(false);
                };
                // Behind an IP header of 20 bytes.
                if answer.get(20..len).is_some_and(|icmp| {
                    icmp.first() == Some(&0) && icmp.get(4..8) == packet.get(4..8)
                }) {
                    return Ok(true);
                }
            }
        })
    }

    fn udp_echo(&self, address: Ipv4Addr) -> Result<f64> {
        let sock = datagrams(address)?;
        self.times(|| {
            sock.send(b"x")?;
            Ok(sock.recv(&mut [0; 8]).is_ok())
        })
    }

    fn tcp_echo(&self, address: Ipv4Addr) -> Result<f64> {
        let mut stream = connect(address, b'e')?;
        self.times(|| echo(&mut stream).map(|()| true))
    }

    /// MiB a second of a stream that takes about as long as it should.
    fn stream(&self, address: Ipv4Addr, what: u8) -> Result<f64> {
        let trial = transfer(address, what, TRIAL)?;
        let bytes = u128::from(TRIAL) * self.seconds.as_micros() / trial.as_micros().max(1);
        let bytes = u64::try_from(bytes)?.max(TRIAL);
        let took = transfer(address, what, bytes)?;
        Ok(bytes as f64 / MIB / took.as_secs_f64())
    }

    /// Thousands of datagrams that arrive in a second, when as many are sent as can be.
    fn flood(&self, address: Ipv4Addr) -> Result<f64> {
        let sock = datagrams(address)?;
        let before = counted(&sock)?;
        let begun = Instant::now();
        while begun.elapsed() < self.seconds {
            for _ in 0..32 {
                // A queue that is full says so, and is emptied.
                let _ = sock.send(&DATAGRAM);
            }
        }
        let took = begun.elapsed();
        std::thread::sleep(SETTLE);
        let arrived = counted(&sock)?.saturating_sub(before);
        Ok(arrived as f64 / took.as_secs_f64() / 1000.0)
    }
}

fn datagrams(address: Ipv4Addr) -> Result<UdpSocket> {
    let sock = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("bind")?;
    sock.connect(at(address)).context("connect")?;
    sock.set_read_timeout(Some(LOST)).context("set a limit")?;
    Ok(sock)
}

/// How many datagrams have arrived there.
fn counted(sock: &UdpSocket) -> Result<u64> {
    for _ in 0..60 {
        sock.send(b"?").context("ask")?;
        let mut count = [0; 8];
        if sock.recv(&mut count).is_ok_and(|len| len == count.len()) {
            return Ok(u64::from_ne_bytes(count));
        }
    }
    bail!("it does not say how many datagrams arrived")
}

fn connect(address: Ipv4Addr, what: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(at(address)).context("connect")?;
    stream.set_nodelay(true).context("set an option")?;
    stream.write_all(&[what]).context("write")?;
    Ok(stream)
}

fn echo(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"x").context("write")?;
    stream.read_exact(&mut [0]).context("read")
}

/// Has so many bytes go to the other end, or come from it.
fn transfer(address: Ipv4Addr, what: u8, bytes: u64) -> Result<Duration> {
    let mut stream = connect(address, what)?;
    stream.write_all(&bytes.to_ne_bytes()).context("write")?;
    let begun = Instant::now();
    let mut piece = vec![0; PIECE];
    let mut left = bytes;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let part = piece.get_mut(..most).unwrap_or_default();
        let done = match what {
            b't' => stream.write(part),
            _ => stream.read(part),
        };
        match done.context("move bytes")? {
            0 => bail!("the other end closed, {left} bytes too early"),
            n => left -= n as u64,
        }
    }
    if what == b't' {
        // All of it is there.
        stream
            .read_exact(&mut [0])
            .context("hear that it is there")?;
    }
    Ok(begun.elapsed())
}
