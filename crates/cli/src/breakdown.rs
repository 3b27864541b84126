//! `walnut stats --memory-breakdown`: the host memory of sandboxes, in parts that add up.

use std::{io, time::Duration};

use anyhow::{Result, anyhow};
use serde::Serialize;
use walnut_observe::{Breakdown, GuestPart, Part, Processes, Subject, guest_parts};
use walnut_sandbox::{Assets, GuestMemoryResponse, Layout, Record, Templates};

use crate::{args::Format, client::Supervisor, output};

/// Longest a guest may take to say what it uses: the rest is known without it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Prints the memory of these containers.
pub(crate) async fn show(layout: &Layout, records: &[Record], format: Format) -> Result<u8> {
    let mut all = Vec::new();
    let processes = Processes::scan()?;
    let mut code = 0;
    for record in records {
        match read(layout, record, &processes).await {
            Ok(account) => all.push(account),
            Err(e) => {
                eprintln!("walnut: {}: {e:#}", record.name);
                code = 1;
            }
        }
    }
    match format {
        Format::Json => output::json(&all)?,
        Format::Table => {
            for (n, account) in all.iter().enumerate() {
                if n > 0 {
                    println!();
                }
                account.print()?;
            }
        }
    }
    Ok(code)
}

/// A sandbox's memory, from outside and from within.
#[derive(Debug, Serialize)]
struct Account {
    id: String,
    name: String,
    driver: Option<String>,
    template: Option<String>,
    /// What its guest has, in bytes.
    machine: u64,
    host: Breakdown,
    /// What the guest does with what the host holds for it; nothing if it does not answer.
    guest: Option<Vec<GuestPart>>,
}

async fn read(layout: &Layout, record: &Record, processes: &Processes) -> Result<Account> {
    let supervisor = record
        .shim_pid
        .ok_or_else(|| anyhow!("its sandbox is not up"))?;
    // The guest first: to ask it touches memory.
    let says = match tokio::time::timeout(PATIENCE, ask(layout, record)).await {
        Ok(Ok(says)) => Some(says),
        Ok(Err(e)) => {
            tracing::debug!("ask the guest: {e:#}");
            None
        }
        Err(_) => None,
    };
    let subject = Subject {
        supervisor,
        files: files(layout, record),
    };
    let host = Breakdown::read(&subject, processes)?;
    let machine = record.memory.unwrap_or(0);
    Ok(Account {
        id: record.id.clone(),
        name: record.name.clone(),
        driver: record.driver.clone(),
        template: record.template.clone(),
        machine,
        guest: says.map(|says| guest_parts(machine, held(&host), &says)),
        host,
    })
}

async fn ask(layout: &Layout, record: &Record) -> Result<GuestMemoryResponse> {
    let supervisor = Supervisor::connect(layout, record).await?;
    Ok(supervisor.stats().await?.1)
}

/// What the host holds for the guest, by share.
fn held(host: &Breakdown) -> u64 {
    host.together
        .guest_private
        .saturating_add(host.together.guest_shared)
        .saturating_add(host.guest_unmapped)
}

/// What the machine began from.
fn files(layout: &Layout, record: &Record) -> Vec<std::path::PathBuf> {
    if let Some(id) = &record.template {
        let files = Templates::new(&layout.state, &layout.run).files(id);
        return vec![files.memory, files.state];
    }
    let assets = Assets::find().ok();
    assets.map_or_else(Vec::new, |a| vec![a.kernel(), a.initramfs()])
}

impl Account {
    fn print(&self) -> io::Result<()> {
        let driver = self.driver.as_deref().unwrap_or("?");
        let from = self.template.as_ref().map_or(String::new(), |id| {
            format!(", from template {}", id.get(..12).unwrap_or(id))
        });
        println!(
            "{} ({driver}, {}{from}); kB",
            self.name,
            output::binary(self.machine)
        );
        let cells = |name: &str, part: &Part, total: u64| {
            let columns = [
                part.anonymous,
                part.file_private,
                part.file_shared,
                part.guest_private,
                part.guest_shared,
                part.kernel,
                total,
            ];
            let mut cells = columns.map(kb).to_vec();
            cells.insert(0, name.to_owned());
            cells
        };
        let mut rows: Vec<Vec<String>> = self
            .host
            .processes
            .iter()
            .map(|p| cells(&format!("{} {}", p.role, p.pid), &p.usage, p.total))
            .collect();
        let unmapped = Part {
            guest_private: self.host.guest_unmapped,
            ..Part::default()
        };
        let mut together = self.host.together;
        together.guest_private = together
            .guest_private
            .saturating_add(self.host.guest_unmapped);
        rows.push(cells("not mapped", &unmapped, self.host.guest_unmapped));
        rows.push(cells("together", &together, self.host.total));
        let rows: Vec<[String; 8]> = rows.into_iter().filter_map(|r| r.try_into().ok()).collect();
        output::table(
            [
                "PROCESS",
                "ANONYMOUS",
                "FILE PRIVATE",
                "FILE SHARED",
                "GUEST PRIVATE",
                "GUEST SHARED",
                "KERNEL",
                "TOTAL",
            ],
            &rows,
        )?;
        self.print_files()?;
        self.print_guest()
    }

    fn print_files(&self) -> io::Result<()> {
        println!("\nIts files in the host's page cache, once for all sandboxes; kB");
        let mut rows: Vec<[String; 5]> = self
            .host
            .files
            .iter()
            .map(|f| {
                let path = f.path.display().to_string();
                [kb(f.size), kb(f.cached), kb(f.counted), kb(f.rest), path]
            })
            .collect();
        for path in &self.host.untold {
            let none = || "--".to_owned();
            let why = format!("{} (not told to this user)", path.display());
            rows.push([none(), none(), none(), none(), why]);
        }
        let empty = String::new;
        let sums = [
            ("together", self.host.page_cache),
            ("with the sandbox's own", self.host.with_page_cache),
        ];
        for (what, bytes) in sums {
            rows.push([empty(), empty(), empty(), kb(bytes), what.to_owned()]);
        }
        output::table(["SIZE", "CACHED", "COUNTED ABOVE", "REST", "FILE"], &rows)
    }

    fn print_guest(&self) -> io::Result<()> {
        let Some(parts) = &self.guest else {
            println!("\nThe guest does not say what it uses its memory for.");
            return Ok(());
        };
        println!("\nWhat the guest does with its part, as it says; kB");
        let mut rows: Vec<_> = parts
            .iter()
            .map(|p| [(p.bytes / 1024).to_string(), p.part.to_owned()])
            .collect();
        rows.push([kb(held(&self.host)), "held by the host".into()]);
        output::table(["KB", "PART"], &rows)
    }
}

fn kb(bytes: u64) -> String {
    (bytes / 1024).to_string()
}
