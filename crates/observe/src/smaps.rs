//! `/proc/PID/smaps` (proc(5)): what each mapping of a process has in memory.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

/// Longest text that is read: some 60 000 mappings, the kernel's usual bound.
const LONGEST: u64 = 64 << 20;
const KIB: u64 = 1024;

/// One mapping; all figures in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// As the kernel shows it, without ` (deleted)`; empty for anonymous memory.
    pub(crate) name: String,
    /// Addresses, in length.
    pub(crate) size: u64,
    /// May be written.
    pub(crate) writable: bool,
    /// Writes are seen by others.
    pub(crate) shared: bool,
    /// The device, `08:01`, and the inode behind it.
    pub(crate) file: Option<(String, u64)>,
    /// Resident.
    pub(crate) rss: u64,
    /// Resident, each page divided by how many map it.
    pub(crate) pss: u64,
    /// Resident and mapped by nobody else.
    pub(crate) private: u64,
    /// Resident and of no file: anonymous, or copied when it was written.
    pub(crate) anonymous: u64,
    /// In huge pages, which the other figures leave out.
    pub(crate) hugetlb: u64,
    /// Swapped out, each page divided by how many have it.
    pub(crate) swap: u64,
    /// Nothing was set aside for it (`MAP_NORESERVE`).
    pub(crate) no_reserve: bool,
}

/// The mappings in a text. Lines that are not understood are left out: kernels add some.
pub(crate) fn parse(text: &str) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        if let Some(mapping) = header(line) {
            all.push(mapping);
        } else if let (Some(mapping), Some((key, value))) = (all.last_mut(), line.split_once(':')) {
            figure(mapping, key, value);
        }
    }
    all
}

/// `7f39-7f3a rw-s 00000000 00:01 774826   /memfd:walnut-guest (deleted)`
fn header(line: &str) -> Option<Mapping> {
    let (range, rest) = line.split_once(' ')?;
    let (from, to) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let size = address(to)?.checked_sub(address(from)?)?;
    let mut words = rest.splitn(5, ' ');
    let (flags, _offset) = (words.next()?, words.next()?);
    let (device, inode) = (words.next()?, words.next()?.parse().ok()?);
    let name = words.next().unwrap_or_default().trim();
    Some(Mapping {
        name: name.strip_suffix(" (deleted)").unwrap_or(name).to_owned(),
        size,
        writable: flags.contains('w'),
        shared: flags.contains('s'),
        file: (inode != 0).then(|| (device.to_owned(), inode)),
        ..Mapping::default()
    })
}

fn figure(mapping: &mut Mapping, key: &str, value: &str) {
    if key == "VmFlags" {
        mapping.no_reserve = value.split_whitespace().any(|flag| flag == "nr");
        return;
    }
    let to = match key {
        "Rss" => &mut mapping.rss,
        "Pss" => &mut mapping.pss,
        "Private_Clean" | "Private_Dirty" => &mut mapping.private,
        "Anonymous" => &mut mapping.anonymous,
        "Shared_Hugetlb" | "Private_Hugetlb" => &mut mapping.hugetlb,
        "SwapPss" => &mut mapping.swap,
        _ => return,
    };
    let kib = value.trim().strip_suffix(" kB").map(str::parse::<u64>);
    if let Some(Ok(kib)) = kib {
        *to = to.saturating_add(kib.saturating_mul(KIB));
    }
}

/// The mappings of a process.
pub(crate) fn read(pid: u32) -> io::Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/smaps");
    Ok(parse(&text(Path::new(&path), LONGEST)?))
}

/// A text of at most `longest` bytes.
pub(crate) fn text(path: &Path, longest: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut file = File::open(path)?.take(longest.saturating_add(1));
    let read = file.read_to_end(&mut bytes)?;
    if u64::try_from(read).is_ok_and(|read| read > longest) {
        return Err(io::Error::other(format!("longer than {longest} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
7f3913fff000-7f3933fff000 rw-s 00000000 00:01 774826                     /memfd:walnut-guest (deleted)
Size:             524288 kB
Rss:               51320 kB
Pss:               51104 kB
Pss_Dirty:         50916 kB
Shared_Dirty:        432 kB
Private_Clean:       188 kB
Private_Dirty:     50700 kB
Anonymous:             0 kB
VmFlags: rd wr sh mr mw me ms dc dd hg
55d0-65d0 r--p 00000000 08:01 77 /with a name of words
Rss: 8 kB
Private_Hugetlb: 2048 kB
SwapPss: 4 kB
FromTheFuture: 7 cows
7f40-7f50 rw-p 00000000 00:00 0 
Anonymous: 12 kB
VmFlags: rd wr mr mw me nr ac
";

    #[test]
    fn mappings_are_told_apart() {
        let all = parse(TEXT);
        assert_eq!(all.len(), 3);
        assert_eq!(
            all[0],
            Mapping {
                name: "/memfd:walnut-guest".into(),
                size: 512 << 20,
                writable: true,
                shared: true,
                file: Some(("00:01".into(), 774_826)),
                rss: 51320 * 1024,
                pss: 51104 * 1024,
                private: 50888 * 1024,
                ..Mapping::default()
            }
        );
        assert_eq!(all[1].name, "/with a name of words");
        assert_eq!((all[1].hugetlb, all[1].swap), (2 << 20, 4096));
        assert!(all[2].no_reserve && all[2].name.is_empty() && all[2].file.is_none());
        assert_eq!(all[2].anonymous, 12 * 1024);
    }

    #[test]
    fn nonsense_is_nothing() {
        let lines = "\n:\n-\n- \nRss: 4 kB\nzz-zz rw-p 0 0 0\n2-1 rw-p 0 00:00 0\n1-2 rw-p 0";
        assert_eq!(parse(lines), []);
        let huge = "1-2 rw-p 0 0 0\nRss: 99999999999999999999 kB\nPss: 18446744073709551615 kB\nPss: -4 kB\nRss";
        let huge = parse(huge);
        assert_eq!((huge[0].rss, huge[0].pss), (0, u64::MAX));
    }

    #[test]
    fn a_text_has_a_bound() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "12345").unwrap();
        assert_eq!(text(file.path(), 5).unwrap(), "12345");
        assert!(text(file.path(), 4).is_err());
    }

    #[test]
    fn this_process_is_as_large_as_the_kernel_says() {
        let pid = std::process::id();
        let touched = std::hint::black_box(vec![1_u8; 8 << 20]);
        let pss: u64 = read(pid).unwrap().iter().map(|m| m.pss).sum();
        let rollup = text(Path::new(&format!("/proc/{pid}/smaps_rollup")), 1 << 16).unwrap();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib: u64 = line.unwrap().trim_end_matches("kB").trim().parse().unwrap();
        drop(touched);
        assert!(pss.abs_diff(kib * 1024) < 2 << 20, "{pss} {kib}");
    }
}
