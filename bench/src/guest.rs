//! Where a guest's memory goes: what its kernel accounts for, beside what the
//! host holds for it.

use std::{collections::HashMap, fs, os::unix::fs::MetadataExt, path::Path};

use anyhow::{Context, Result};

/// The file behind a guest's memory, kB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// What the machine has.
    size: i64,
    /// What of it the host holds.
    held: i64,
}

impl Memory {
    /// Reads it from a process that has the file open.
    pub(crate) fn of(process: &Path) -> Option<Self> {
        fs::read_dir(process.join("fd"))
            .ok()?
            .flatten()
            .find_map(|fd| {
                let target = fs::read_link(fd.path()).ok()?;
                let ours = target.to_str()?.starts_with("/memfd:walnut-guest");
                let file = ours.then(|| fs::metadata(fd.path()).ok()).flatten()?;
                Some(Self {
                    size: i64::try_from(file.len() / 1024).ok()?,
                    held: i64::try_from(file.blocks() / 2).ok()?,
                })
            })
    }
}

/// Prints the parts of a guest's memory; `meminfo` is what the guest says.
pub(crate) fn print(memory: Memory, meminfo: &str) -> Result<()> {
    let all: HashMap<&str, i64> = meminfo
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            Some((name, rest.split_whitespace().next()?.parse().ok()?))
        })
        .collect();
    let get = |name: &str| {
        let kb = all.get(name).copied();
        kb.with_context(|| format!("the guest's /proc/meminfo has no {name}"))
    };
    // A `struct page` of 64 bytes for each 4096.
    let pages = memory.size / 64;
    let reserved = memory.size - get("MemTotal")? - pages;
    let used = get("MemTotal")? - get("MemFree")?;
    let mut rows = vec![
        (
            "kernel image, firmware, other memory kept from the allocator",
            reserved,
        ),
        ("the kernel's array of pages (1/64 of the memory)", pages),
        ("initramfs with agent and helper; tmpfs", get("Shmem")?),
        (
            "page cache of the image's files",
            get("Cached")? + get("Buffers")? - get("Shmem")?,
        ),
        ("processes' anonymous memory", get("AnonPages")?),
        ("slab", get("Slab")?),
        (
            "kernel stacks, page tables, per CPU",
            get("KernelStack")? + get("PageTables")? + get("Percpu")?,
        ),
    ];
    let known: i64 = rows[2..].iter().map(|(_, kb)| kb).sum();
    rows.push((
        "other pages of the kernel (drivers' buffers, vmalloc)",
        used - known,
    ));
    let sum: i64 = rows.iter().map(|(_, kb)| kb).sum();
    rows.push(("in use, as the guest accounts it", sum));
    rows.push((
        "free pages the host still holds, less pages in use never touched",
        memory.held - sum,
    ));
    rows.push(("held by the host", memory.held));
    println!(
        "\n## Where the guest's memory goes, kB (of {})\n",
        memory.size
    );
    println!("| part | kB |\n|---|---|");
    for (part, kb) in rows {
        println!("| {part} | {kb} |");
    }
    Ok(())
}
