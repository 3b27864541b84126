//! Processors that a machine has and its guest has not brought online: a guest
//! boots with as many as it was asked to, and more come when the host says so.

use std::fs;
use std::io;
use std::path::Path;

/// Where the kernel has them.
const CPUS: &str = "/sys/devices/system/cpu";

/// Why there are not so many processors online.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// There are fewer.
    #[error("the machine has {0} processors")]
    Few(u32),
    /// The kernel did not do it.
    #[error("processor {0}: {1}")]
    Kernel(u32, #[source] io::Error),
    /// The kernel does not tell.
    #[error("look for processors: {0}")]
    Unknown(#[source] io::Error),
}

/// Brings processors online until `count` are; says how many are. Others have their
/// turn between two.
pub(crate) async fn online(count: u32) -> Result<u32, Refused> {
    bring(Path::new(CPUS), count).await
}

async fn bring(cpus: &Path, count: u32) -> Result<u32, Refused> {
    let list = |name: &str| {
        let text = fs::read_to_string(cpus.join(name)).map_err(Refused::Unknown)?;
        parse(text.trim())
            .ok_or_else(|| Refused::Unknown(io::Error::other(format!("{name} is {text:?}"))))
    };
    let online = list("online")?;
    let mut now = len(online.len());
    for cpu in list("present")? {
        if now >= count {
            return Ok(now);
        }
        if !online.contains(&cpu) {
            fs::write(cpus.join(format!("cpu{cpu}/online")), "1")
                .map_err(|e| Refused::Kernel(cpu, e))?;
            now += 1;
            tokio::task::yield_now().await;
        }
    }
    match now >= count {
        true => Ok(now),
        false => Err(Refused::Few(now)),
    }
}

fn len(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The kernel's lists of processors: `0-2,5`.
fn parse(list: &str) -> Option<Vec<u32>> {
    /// More than any kernel has.
    const MOST: u32 = 8192;
    let mut numbers = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MOST {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(parse("0"), Some(vec![0]));
        assert_eq!(parse("0-2,5"), Some(vec![0, 1, 2, 5]));
        for bad in ["", "x", "2-1", "1-", "0-4294967295", "-1", "0,,1"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn the_lowest_come_first_and_no_more_than_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        for n in 1..4 {
            fs::create_dir(dir.path().join(format!("cpu{n}"))).unwrap();
        }
        fs::write(dir.path().join("present"), "0-3\n").unwrap();
        fs::write(dir.path().join("online"), "0,2\n").unwrap();
        let written = |n: u32| dir.path().join(format!("cpu{n}/online")).exists();
        assert_eq!(bring(dir.path(), 1).await.unwrap(), 2);
        assert!(!written(1) && !written(3));
        assert_eq!(bring(dir.path(), 3).await.unwrap(), 3);
        assert!(written(1) && !written(2) && !written(3));
        let refused = bring(dir.path(), 5).await;
        assert!(matches!(refused, Err(Refused::Few(4))), "{refused:?}");
        assert!(written(3));
    }
}
