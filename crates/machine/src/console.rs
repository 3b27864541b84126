//! A guest's last words.

use crate::process::quotable;

/// How a kernel and an agent begin the sentence that ends the guest.
const OMENS: [&str; 2] = ["Kernel panic - not syncing: ", "walnut-agent: fatal: "];

/// The sentence with which the guest ended, if its console holds one. An agent
/// that gives up says so before its exit makes the kernel panic, so the first
/// sentence of the tail is the cause.
pub(crate) fn last_words(console: &str) -> Option<String> {
    console.lines().find_map(|line| {
        let start = OMENS
            .iter()
            .filter_map(|omen| line.find(omen).map(|at| at + omen.len()))
            .min()?;
        // The kernel repeats a panic as "end Kernel panic - not syncing: … ]---".
        let words = line[start..].trim_end().trim_end_matches("]---");
        Some(quotable(words))
    })
}

/// How many lines of a console tell why a kernel panicked: an oops, and its end.
const EVIDENCE: usize = 80;

/// What a guest's kernel wrote before it panicked, for whoever looks into it.
pub(crate) fn evidence(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    let tail = &lines[lines.len().saturating_sub(EVIDENCE)..];
    tail.iter().map(|line| quotable(line) + "\n").collect()
}

/// A hint for people to what the guest was doing: its console's last line.
pub(crate) fn hint(console: &str) -> String {
    let line = console.lines().rev().find(|l| !l.trim().is_empty());
    match line {
        Some(line) => format!("its console ends with {:?}", quotable(line)),
        None => "its console is silent".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_found() {
        let console = "[    0.5] VFS: no root\r\n[    0.6] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[ 0.7] CPU: 0\r\n[    0.9] ---[ end Kernel panic - not syncing: VFS ]---\r\n";
        assert_eq!(
            last_words(console).as_deref(),
            Some("VFS: Unable to mount root fs")
        );
        assert_eq!(last_words("all is well\n"), None);
    }

    #[test]
    fn the_agents_reason_wins_over_the_panic_it_causes() {
        let console = "walnut-agent: fatal: mount /proc: EPERM\r\n[1.0] Kernel panic - not syncing: Attempted to kill init!";
        assert_eq!(last_words(console).as_deref(), Some("mount /proc: EPERM"));
    }

    #[test]
    fn evidence_is_the_tail_and_cannot_disturb_a_log() {
        let console: String = (0..200).map(|n| format!("line\x1b {n}\r\n")).collect();
        let told = evidence(&console);
        assert_eq!(told.lines().count(), EVIDENCE);
        assert!(told.ends_with("199\n"), "{told}");
        assert!(!told.contains('\x1b'), "{told}");
    }

    #[test]
    fn hints() {
        assert_eq!(hint("a\nb\x07\n\n"), "its console ends with \"b\"");
        assert_eq!(hint(""), "its console is silent");
    }
}
