//! A way to a machine's devices and memory from outside: QEMU's test protocol
//! (`-qtest`; qemu, softmmu/qtest.c), at guest-physical addresses. A guest that broke
//! out of its QEMU answers here: what it says is taken for a number and no more.

use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::qmp;
use crate::{
    Error,
    takeover::{Fd, Giver},
};

/// Longest answer: `OK 0x`, 16 digits, and the end of the line.
const ANSWER_MAX: usize = 24;

/// The client's end.
#[derive(Debug)]
pub(super) struct Registers(UnixStream);

impl Registers {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// For the next program, as between two exchanges nothing is under way.
    pub(super) fn give(&self, giver: &mut Giver) -> Fd {
        giver.give(&self.0)
    }

    /// Writes values of 32 bits, in order.
    pub(super) async fn write(&mut self, writes: &[(u64, u32)]) -> Result<(), Error> {
        let line = |(at, value): &(u64, u32)| format!("writel {at:#x} {value:#x}\n");
        let lines: String = writes.iter().map(line).collect();
        self.ask(&lines, writes.len()).await.map(drop)
    }

    /// Writes a value of 16 bits.
    pub(super) async fn write_u16(&mut self, at: u64, value: u16) -> Result<(), Error> {
        let line = format!("writew {at:#x} {value:#x}\n");
        self.ask(&line, 1).await.map(drop)
    }

    /// Reads a value of 16 bits.
    pub(super) async fn read_u16(&mut self, at: u64) -> Result<u16, Error> {
        let value = self.ask(&format!("readw {at:#x}\n"), 1).await?;
        u16::try_from(value).map_err(failed)
    }

    /// Reads a value of 32 bits.
    pub(super) async fn read_u32(&mut self, at: u64) -> Result<u32, Error> {
        let value = self.ask(&format!("readl {at:#x}\n"), 1).await?;
        u32::try_from(value).map_err(failed)
    }

    /// Reads a value of 64 bits.
    pub(super) async fn read_u64(&mut self, at: u64) -> Result<u64, Error> {
        self.ask(&format!("readq {at:#x}\n"), 1).await
    }

    /// Sends lines, and returns the last answer's number.
    async fn ask(&mut self, lines: &str, answers: usize) -> Result<u64, Error> {
        tokio::time::timeout(qmp::COMMAND_DEADLINE, self.exchange(lines, answers))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed)
    }

    async fn exchange(&mut self, lines: &str, answers: usize) -> io::Result<u64> {
        self.0.write_all(lines.as_bytes()).await?;
        let mut last = 0;
        let mut line = Vec::with_capacity(ANSWER_MAX);
        let mut stream = tokio::io::BufReader::new(&mut self.0);
        for _ in 0..answers {
            line.clear();
            while line.last() != Some(&b'\n') && line.len() < ANSWER_MAX {
                line.push(stream.read_u8().await?);
            }
            last = answer(&line).ok_or_else(|| io::Error::other("QEMU refused it"))?;
        }
        Ok(last)
    }
}

fn failed(reason: impl ToString) -> Error {
    qmp::failed("reach a device's registers", reason)
}

/// The number of an answer, 0 where it is only said that all is well.
fn answer(line: &[u8]) -> Option<u64> {
    let words = std::str::from_utf8(line.strip_prefix(b"OK")?).ok()?;
    match words.strip_suffix('\n')? {
        "" => Some(0),
        number => u64::from_str_radix(number.strip_prefix(" 0x")?, 16).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        assert_eq!(answer(b"OK\n"), Some(0));
        assert_eq!(answer(b"OK 0x000000000000002b\n"), Some(43));
        let odd: [&[u8]; 6] = [
            b"",
            b"OK",
            b"ERR\n",
            b"OK 43\n",
            b"OK 0x\n",
            b"FAIL Unknown\n",
        ];
        for odd in odd {
            assert_eq!(answer(odd), None);
        }
    }

    #[tokio::test]
    async fn a_peer_that_refuses_or_babbles_is_an_error() {
        for (answers, good) in [
            ("OK\nOK\n", true),
            ("OK\nERR\n", false),
            ("OK 0x1111111111111111111111", false),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(answers.as_bytes()).await.unwrap();
            let mut registers = Registers::new(ours);
            let wrote = registers.write(&[(0x10, 1), (0x14, 2)]).await;
            assert_eq!(wrote.is_ok(), good, "{wrote:?}");
            let expected = b"writel 0x10 0x1\nwritel 0x14 0x2\n";
            let mut lines = vec![0; expected.len()];
            theirs.read_exact(&mut lines).await.unwrap();
            assert_eq!(lines, expected);
        }
    }
}
