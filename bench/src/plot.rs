//! Plots, as Mermaid's `xychart-beta`: text that GitHub and most viewers of Markdown draw.

/// One bar for each name, in `unit`.
pub(crate) fn bars(title: &str, unit: &str, bars: &[(String, f64)]) -> String {
    let names: Vec<_> = bars
        .iter()
        .map(|(name, _)| format!("\"{}\"", name.replace('"', "'")))
        .collect();
    let values: Vec<_> = bars
        .iter()
        .map(|(_, value)| format!("{:.0}", if value.is_finite() { *value } else { 0.0 }))
        .collect();
    format!(
        "```mermaid\nxychart-beta horizontal\n    title \"{title}\"\n    x-axis [{}]\n    \
         y-axis \"{unit}\"\n    bar [{}]\n```",
        names.join(", "),
        values.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::bars;

    #[test]
    fn a_chart_has_a_value_for_each_name() {
        let chart = bars(
            "Start",
            "ms",
            &[("a".into(), 1.6), ("b \"c\"".into(), f64::NAN)],
        );
        assert!(chart.contains("x-axis [\"a\", \"b 'c'\"]"), "{chart}");
        assert!(chart.contains("bar [2, 0]"), "{chart}");
    }
}
