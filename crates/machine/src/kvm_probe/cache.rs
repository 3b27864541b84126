//! The verdict, kept for one boot of one kernel on one processor.

use std::{
    fs, io,
    io::{Read, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::{KvmStatus, probe};

const FILE: &str = "kvm-probe.json";
/// Longest cache file that is read, in bytes.
const FILE_MAX: u64 = 8192;

#[derive(Debug, Serialize, Deserialize)]
struct Cached {
    key: String,
    status: KvmStatus,
}

/// As [`probe`], once per boot: the verdict is kept in `dir`, which only this
/// user may write to. A verdict that depends on the user, not the host, is not
/// kept, and a cache that cannot be written costs a probe, never an error.
pub fn probe_cached(dir: &Path) -> KvmStatus {
    let key = key();
    if let Some(status) = load(dir, &key) {
        return status;
    }
    let status = probe();
    if matches!(
        status,
        KvmStatus::Usable { .. } | KvmStatus::Unusable { .. }
    ) && let Err(error) = save(dir, key, status.clone())
    {
        tracing::debug!(%error, dir = %dir.display(), "KVM verdict not kept");
    }
    status
}

/// What the verdict holds for.
fn key() -> String {
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find(|l| l.starts_with("model name"));
    format!(
        "{}\n{}\n{}",
        read("/proc/sys/kernel/random/boot_id").trim(),
        read("/proc/version").trim(),
        model.unwrap_or_default()
    )
}

fn load(dir: &Path, key: &str) -> Option<KvmStatus> {
    // /dev/kvm may have come or gone, or be another user's.
    fs::File::open("/dev/kvm").ok()?;
    let mut json = Vec::new();
    let file = fs::File::open(dir.join(FILE)).ok()?;
    file.take(FILE_MAX).read_to_end(&mut json).ok()?;
    let cached: Cached = serde_json::from_slice(&json).ok()?;
    (cached.key == key).then_some(cached.status)
}

fn save(dir: &Path, key: String, status: KvmStatus) -> io::Result<()> {
    let temporary = dir.join(format!(".{FILE}.{}", std::process::id()));
    let written = fs::File::create(&temporary).and_then(|mut file| {
        file.write_all(&serde_json::to_vec(&Cached { key, status })?)?;
        fs::rename(&temporary, dir.join(FILE))
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_kept_for_their_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let status = KvmStatus::Unusable {
            reason: "test".into(),
        };
        save(dir.path(), "this boot".into(), status.clone()).unwrap();
        assert_eq!(load(dir.path(), "another boot"), None);
        if fs::File::open("/dev/kvm").is_ok() {
            assert_eq!(load(dir.path(), "this boot"), Some(status));
        }
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(load(dir.path(), "this boot"), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
