//! The line by which a host program names the guest port it wants: no I/O.

/// Longest line accepted, its newline included.
pub(super) const MAX_LINE: usize = 32;

/// The line is not `CONNECT <port>`, or is too long.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadLine;

/// A `CONNECT <port>\n` line that may arrive in any number of pieces.
#[derive(Debug, Default)]
pub(super) struct Line {
    buf: [u8; MAX_LINE],
    len: usize,
}

impl Line {
    /// How many of the next bytes the line can still take.
    pub(super) fn room(&self) -> usize {
        MAX_LINE - self.len
    }

    /// Takes bytes up to and including the newline. Returns how many belong to
    /// the line, and the port once the line is complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(usize, Option<u32>), BadLine> {
        let end = bytes.iter().position(|&byte| byte == b'\n');
        let taken = end.map_or(bytes.len(), |newline| newline + 1);
        let room = self
            .buf
            .get_mut(self.len..self.len + taken)
            .ok_or(BadLine)?;
        room.copy_from_slice(&bytes[..taken]);
        self.len += taken;
        if end.is_some() {
            return Ok((taken, Some(parse(&self.buf[..self.len])?)));
        }
        if self.len == MAX_LINE {
            return Err(BadLine);
        }
        Ok((taken, None))
    }
}

/// `CONNECT`, in any case, blanks, a decimal port, nothing else.
fn parse(line: &[u8]) -> Result<u32, BadLine> {
    let line = std::str::from_utf8(line).map_err(|_| BadLine)?;
    let mut words = line.split_ascii_whitespace();
    let (Some(keyword), Some(port), None) = (words.next(), words.next(), words.next()) else {
        return Err(BadLine);
    };
    // `parse` alone would take a sign.
    if !keyword.eq_ignore_ascii_case("connect") || !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(BadLine);
    }
    port.parse().map_err(|_| BadLine)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(line: &[u8]) -> Result<(usize, Option<u32>), BadLine> {
        Line::default().push(line)
    }

    #[test]
    fn accepts_the_line_and_leaves_what_follows() {
        assert_eq!(whole(b"CONNECT 1024\n"), Ok((13, Some(1024))));
        assert_eq!(whole(b"connect 7\nhello"), Ok((10, Some(7))));
        assert_eq!(whole(b"CoNnEcT 4294967295\n"), Ok((19, Some(u32::MAX))));
        assert_eq!(whole(b"CONNECT 5\r\n"), Ok((11, Some(5))));
    }

    #[test]
    fn accepts_it_byte_by_byte() {
        let mut line = Line::default();
        let text = b"CONNECT 1025\n";
        for byte in &text[..12] {
            assert_eq!(line.push(&[*byte]), Ok((1, None)));
        }
        assert_eq!(line.push(&text[12..]), Ok((1, Some(1025))));
    }

    #[test]
    fn refuses_everything_else() {
        for bad in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT +5\n",
            b"CONNECT -5\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 5 6\n",
            b"CONNEC 5\n",
            b"CONNECT 0x5\n",
            b"\xff\xfe\n",
        ] {
            assert_eq!(whole(bad), Err(BadLine), "{bad:?}");
        }
        assert_eq!(whole(&[b'C'; 32]), Err(BadLine));
        assert_eq!(whole(&[b'C'; 33]), Err(BadLine));
        let mut line = Line::default();
        assert_eq!(line.push(&[b' '; 31]), Ok((31, None)));
        assert_eq!(line.push(b" "), Err(BadLine));
    }
}
