//! What somebody may have meant who has mistyped a name.

/// Longest word that is compared with others.
const SIMILAR_MAX: usize = 128;

/// The word among `words` that `name` may have been meant for.
pub fn similar<'a>(name: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Nobody mistypes half of a word; and what is long is nobody's typing.
    let most = (name.chars().count() / 3).min(3);
    words
        .filter(|word| name.len() <= SIMILAR_MAX && word.len() <= SIMILAR_MAX)
        .map(|word| (distance(name, word), word))
        .filter(|(distance, _)| (1..=most).contains(distance))
        .min()
        .map(|(_, word)| word)
}

/// Letters that have to be put in, left out, replaced or exchanged with the next one.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<_>, Vec<_>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let last = &rows[i - 1];
            let mut best = (last[j] + 1).min(row[j - 1] + 1);
            best = best.min(last[j - 1] + usize::from(a[i - 1] != b[j - 1]));
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_understood() {
        let words = ["web", "database", "cache"];
        let found = |name| similar(name, words.into_iter());
        assert_eq!(found("wbe"), Some("web"));
        assert_eq!(found("databse"), Some("database"));
        assert_eq!(found("cahce"), Some("cache"));
        for name in ["", "w", "xyz", "proxy", &"x".repeat(1000)] {
            assert_eq!(found(name), None, "{name}");
        }
    }
}
