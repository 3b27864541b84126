//! `walnut check`.

use anyhow::Result;
use walnut_sandbox::{
    Assets, find_virtiofsd,
    machine::{self, HostReport, Level, Programs},
};

use crate::{
    args::{CheckArgs, Format},
    install::front_ends,
    output,
};

pub(crate) fn check(args: &CheckArgs) -> Result<u8> {
    let dir = match &args.lib {
        Some(dir) => dir.clone(),
        None => Assets::find().map_or_else(|_| "/usr/lib/walnut".into(), |a| a.dir),
    };
    let assets = Assets { dir };
    let programs = Programs::new(&assets.dir);
    let files = machine::Assets {
        kernel: assets.kernel(),
        initramfs: assets.initramfs(),
        virtiofsd: find_virtiofsd(),
    };
    let mut report = HostReport::gather(&programs, &files);
    report.items.extend(front_ends());
    if args.format == Format::Json {
        output::json(&report)?;
    } else {
        show(&report)?;
    }
    Ok(if report.can_run() { 0 } else { 1 })
}

fn show(report: &HostReport) -> Result<()> {
    let rows: Vec<_> = report
        .items
        .iter()
        .map(|item| {
            let mark = match item.status {
                Level::Ok => "ok",
                Level::Warn => "warn",
                Level::Missing => "missing",
            };
            let detail = if item.advice.is_empty() {
                item.detail.clone()
            } else {
                format!("{} ({})", item.detail, item.advice)
            };
            [mark.to_owned(), item.name.clone(), detail]
        })
        .collect();
    output::table(["", "WHAT", "HERE"], &rows)?;
    println!();
    match &report.auto {
        Some(chosen) => println!("auto: {}: {}", chosen.driver.name(), chosen.reason),
        None => println!("auto: no driver can run here"),
    }
    Ok(())
}
