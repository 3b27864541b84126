//! Processors that a machine has and its guest has not brought online: a guest
//! boots with as many as it was asked to, and more come, and go, when the host says so.

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
    let online = list(cpus, "online")?;
    let mut now = len(online.len());
    for cpu in list(cpus, "present")? {
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

/// Takes processors offline, those with the highest numbers first, until only `count` are
/// left, or one stays; says how many are. The first one stays in any case.
pub(crate) async fn offline(count: u32) -> Result<u32, Refused> {
    take(Path::new(CPUS), count).await
}

async fn take(cpus: &Path, count: u32) -> Result<u32, Refused> {
    let mut online = list(cpus, "online")?;
    while len(online.len()) > count.max(1)
        && let Some(cpu) = online.pop()
    {
        if let Err(e) = fs::write(cpus.join(format!("cpu{cpu}/online")), "0") {
            return Err(Refused::Kernel(cpu, e));
        }
        tokio::task::yield_now().await;
    }
    Ok(len(online.len()))
}

/// One of the kernel's lists.
fn list(cpus: &Path, name: &str) -> Result<Vec<u32>, Refused> {
    let text = fs::read_to_string(cpus.join(name)).map_err(Refused::Unknown)?;
    parse(text.trim())
        .ok_or_else(|| Refused::Unknown(io::Error::other(format!("{name} is {text:?}"))))
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
    async fn the_highest_go_first_and_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        for n in 1..4 {
            fs::create_dir(dir.path().join(format!("cpu{n}"))).unwrap();
        }
        fs::write(dir.path().join("online"), "0-1,3\n").unwrap();
        let written = |n: u32| fs::read_to_string(dir.path().join(format!("cpu{n}/online")));
        assert_eq!(take(dir.path(), 3).await.unwrap(), 3);
        assert_eq!(take(dir.path(), 2).await.unwrap(), 2);
        assert_eq!(written(3).unwrap(), "0");
        assert!(written(1).is_err());
        assert_eq!(take(dir.path(), 0).await.unwrap(), 1);
        assert_eq!(written(1).unwrap(), "0");
        // As a processor that cannot go.
        fs::remove_dir_all(dir.path().join("cpu3")).unwrap();
        let refused = take(dir.path(), 1).await;
        assert!(matches!(refused, Err(Refused::Kernel(3, _))), "{refused:?}");
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
