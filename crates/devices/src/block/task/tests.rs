//! Tasks against a kernel that does as little as it may.

use vm_memory::{Bytes, GuestMemory, Permissions};

use super::*;

const LEN: usize = 0x1_0000;

fn memory() -> Arc<Memory> {
    Arc::new(Memory::from_ranges(&[(GuestAddress(0), LEN)]).unwrap())
}

fn rules() -> Rules<'static> {
    Rules {
        sectors: 1 << 20,
        read_only: false,
        cache: Cache::Writeback,
        write_through: false,
        serial: &[0; SERIAL_LEN],
    }
}

/// A task over the pieces of memory given, and its list.
fn task(
    memory: &Arc<Memory>,
    kind: Kind,
    at: u64,
    parts: &[(u64, usize)],
    rules: &Rules<'_>,
) -> (Result<Task, (Status, u32)>, Vec<Piece>) {
    let mut list = vec![Piece::EMPTY; 264];
    let mut pieces = Pieces::new(&mut list);
    for (at, len) in parts {
        let at = GuestAddress(*at);
        for slice in memory.get_slices(at, *len, Permissions::Write).unwrap() {
            assert!(pieces.push(&slice.unwrap()));
        }
    }
    let n = pieces.len();
    let total: usize = parts.iter().map(|(_, len)| len).sum();
    let (readable, writable) = match kind {
        Kind::Read | Kind::GetId => (0, total as u64),
        _ => (total as u64, 0),
    };
    let request = Request {
        kind,
        at,
        readable,
        writable,
    };
    let origin = Origin {
        queue: 0,
        head: 0,
        status: GuestAddress(0),
        memory: Arc::clone(memory),
    };
    (plan(origin, &request, &list, n, rules), list)
}

/// What the disk holds at an offset.
fn content(at: u64) -> u8 {
    at.wrapping_mul(0x9e37_79b9).to_le_bytes()[1]
}

#[test]
fn a_transfer_in_fragments_moves_every_byte_once() {
    let mut seed = 1u64;
    let mut random = |n: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % n
    };
    for _ in 0..500 {
        let memory = memory();
        let start = random(1000) * SECTOR;
        let parts = [(0x1000, 700), (0x3001, 324), (0x5000, 512 * (1 + 7))];
        let total: usize = parts.iter().map(|(_, len)| len).sum();
        let (task, mut list) = task(&memory, Kind::Read, start, &parts, &rules());
        let mut task = task.unwrap();
        let mut next = task.call(&mut list);
        let mut moved = 0;
        loop {
            let (iov, n, at) = match next {
                Next::Call(Call::Read { iov, n, at }) => (iov, n, u64::try_from(at).unwrap()),
                Next::Done(status) => {
                    assert_eq!(status, Status::Ok);
                    break;
                }
                Next::Call(other) => panic!("{other:?}"),
            };
            assert_eq!(at, start + moved);
            if random(4) == 0 {
                let errno = [Errno::EINTR, Errno::EAGAIN][usize::try_from(random(2)).unwrap()];
                next = task.advance(-i64::from(errno as i32), &mut list);
                continue;
            }
            // SAFETY: the call's pieces, as the kernel would see them.
            let iov = unsafe { std::slice::from_raw_parts(iov, usize::try_from(n).unwrap()) };
            let room: usize = iov.iter().map(|piece| piece.iov_len).sum();
            let count = 1 + random(room as u64);
            let mut left = count;
            for piece in iov {
                for offset in 0..piece.iov_len.min(usize::try_from(left).unwrap()) {
                    // SAFETY: within the piece, which is mapped.
                    unsafe {
                        let to = piece.iov_base.cast::<u8>().add(offset);
                        to.write_volatile(content(start + moved));
                    }
                    moved += 1;
                    left -= 1;
                }
            }
            next = task.advance(i64::try_from(count).unwrap(), &mut list);
        }
        assert_eq!(moved, total as u64);
        let mut offset = start;
        for (at, len) in parts {
            let mut data = vec![0; len];
            memory.read_slice(&mut data, GuestAddress(at)).unwrap();
            for byte in data {
                assert_eq!(byte, content(offset));
                offset += 1;
            }
        }
    }
}

#[test]
fn what_the_kernel_will_not_do_ends_in_an_error() {
    let memory = memory();
    let again = -i64::from(Errno::EAGAIN as i32);
    for (result, most) in [(again, 17), (-5, 1), (0, 1), (i64::MIN, 1)] {
        let (task, mut list) = task(&memory, Kind::Read, 0, &[(0, 512)], &rules());
        let mut task = task.unwrap();
        let mut calls = 0;
        let mut next = task.call(&mut list);
        while let Next::Call(_) = next {
            calls += 1;
            next = task.advance(result, &mut list);
        }
        assert!(matches!(next, Next::Done(Status::IoErr)) && calls == most);
    }
    // More than was asked for, which cannot be, is no more than that.
    let (task, mut list) = task(&memory, Kind::Write, 0, &[(0, 512)], &rules());
    let next = task.unwrap().advance(i64::MAX, &mut list);
    assert!(matches!(next, Next::Done(Status::Ok)));
}

#[test]
fn zeroes_are_written_in_fragments_when_they_have_to_be() {
    let memory = memory();
    let mut raw = Vec::new();
    for (sector, count) in [(10u64, 5000u32), (9000, 1)] {
        raw.extend(sector.to_le_bytes());
        raw.extend(count.to_le_bytes());
        raw.extend([0; 4]);
    }
    memory.write_slice(&raw, GuestAddress(0)).unwrap();
    let rules = Rules {
        write_through: true,
        ..rules()
    };
    let (task, mut list) = task(&memory, Kind::WriteZeroes, 0, &[(0, raw.len())], &rules);
    let mut task = task.unwrap();
    let mut next = task.call(&mut list);
    assert!(matches!(next, Next::Call(Call::Allocate { .. })));
    next = task.advance(-i64::from(Errno::EOPNOTSUPP as i32), &mut list);
    let (mut expected, mut written, mut flushed) = (10 * 512, 0, false);
    while let Next::Call(call) = next {
        next = match call {
            Call::Write { at, n, .. } => {
                if written == 5000 * 512 {
                    expected = 9000 * 512;
                }
                assert_eq!(at, expected);
                // The first segment in fragments, the second at once.
                let left = if written < 5000 * 512 {
                    5000 * 512 - written
                } else {
                    512
                };
                let count = left.min(i64::from(n) * 1000);
                written += count;
                expected += count;
                task.advance(count, &mut list)
            }
            Call::Sync => {
                flushed = true;
                task.advance(0, &mut list)
            }
            other => panic!("{other:?}"),
        };
    }
    assert!(matches!(next, Next::Done(Status::Ok)) && flushed);
    assert_eq!(written, 5001 * 512);
}
