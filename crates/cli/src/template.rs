//! `walnut template`.

use anyhow::{Context, Result, bail};
use serde_json::json;
use walnut_sandbox::{Assets, Layout, Listed, Settings, Templates, Wanted, now_ns};

use crate::{
    args::{MachineArgs, TemplateCommand, TemplateCreateArgs, TemplateLsArgs},
    format::{List, row},
    output, spec,
};

const SHORT_ID: usize = 12;

pub(crate) async fn template(command: TemplateCommand) -> Result<u8> {
    let layout = Layout::from_env()?;
    let templates = Templates::new(&layout.state, &layout.run);
    match command {
        TemplateCommand::Ls(args) => ls(&templates, &args)?,
        TemplateCommand::Create(args) => create(&layout, &templates, &args).await?,
        TemplateCommand::Rm(args) => {
            let all = templates.list()?;
            let chosen = match args.all {
                true => all.iter().collect(),
                false => find(&all, &args.templates)?,
            };
            for listed in chosen {
                templates.remove(&listed.template.id)?;
                println!("{}", listed.template.id);
            }
        }
        TemplateCommand::Inspect(names) => {
            output::json(&find(&templates.list()?, &names.templates)?)?;
        }
    }
    Ok(0)
}

/// The templates so named, each once.
fn find<'a>(all: &'a [Listed], names: &[String]) -> Result<Vec<&'a Listed>> {
    let mut found: Vec<&Listed> = Vec::new();
    for name in names {
        let mut hits = all.iter().filter(|l| l.template.id.starts_with(name));
        let hit = match (hits.next(), hits.next()) {
            (Some(hit), None) if !name.is_empty() => hit,
            (Some(_), Some(_)) => {
                bail!("template {name:?}: several IDs start so; give more digits")
            }
            _ => bail!("no such template: {name} (`walnut template ls` lists them)"),
        };
        if !found.iter().any(|f| f.template.id == hit.template.id) {
            found.push(hit);
        }
    }
    Ok(found)
}

fn ls(templates: &Templates, args: &TemplateLsArgs) -> Result<()> {
    let all = templates.list()?;
    let short = |id: &str| id.get(..SHORT_ID).unwrap_or(id).to_owned();
    if args.quiet {
        for listed in &all {
            println!("{}", short(&listed.template.id));
        }
        return Ok(());
    }
    let now = now_ns();
    let rows: Vec<_> = all
        .iter()
        .map(|listed| {
            let template = &listed.template;
            row(json!({
                "ID": short(&template.id),
                "Driver": template.shape.driver,
                "Memory": output::bytes(template.shape.memory),
                "VCPUs": template.shape.vcpus,
                "Size": output::bytes(listed.size),
                "CreatedSince": format!("{} ago", output::ago(template.created_at, now)),
                "Status": match &listed.stale {
                    None => "usable".to_owned(),
                    Some(why) => format!("stale: {why}"),
                },
            }))
        })
        .collect();
    let json = || Ok(serde_json::to_value(&all)?);
    LIST.show(&args.format, &rows, json)
}

/// What `template ls` shows.
const LIST: List<'_> = List {
    fields: &[
        ("ID", "TEMPLATE ID"),
        ("Driver", "DRIVER"),
        ("Memory", "MEMORY"),
        ("VCPUs", "VCPUS"),
        ("Size", "SIZE"),
        ("CreatedSince", "CREATED"),
        ("Status", "STATUS"),
    ],
    columns: &[
        "ID",
        "Driver",
        "Memory",
        "VCPUs",
        "Size",
        "CreatedSince",
        "Status",
    ],
};

/// The machine that containers with these limits get.
pub(crate) fn wanted(args: &MachineArgs) -> Result<Wanted> {
    let mut settings = Settings::load()?;
    if let Some(driver) = &args.driver {
        settings.machine.driver = driver.parse()?;
    }
    let limits = spec::resources(args.memory, args.cpus, None);
    let container = json!({ "ociVersion": "1.0.2", "linux": { "resources": limits } });
    let container = serde_json::from_value(container).context("describe the machine")?;
    Ok(Wanted::for_container(&settings, &container))
}

async fn create(layout: &Layout, templates: &Templates, args: &TemplateCreateArgs) -> Result<()> {
    let wanted = wanted(&args.machine)?;
    let cache = Some(layout.run.clone());
    let (assets, deadline) = (Assets::find()?, Settings::load()?.boot_timeout());
    loop {
        let made = templates.make(&wanted, &assets, cache.clone(), deadline);
        if let Some(template) = made.await? {
            println!("{}", template.id);
            return Ok(());
        }
        // One at a time on a node; it may be the one that is wanted. ^C ends the wait.
        templates.wait_for_maker()?;
    }
}
