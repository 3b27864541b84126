//! `walnut pull`, and the bars it draws.

use std::{collections::HashMap, io::IsTerminal, sync::Mutex};

use anyhow::{Result, bail};
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use walnut_image::{Event, Image, Platform, Progress, PullOptions, Reference, Store};
use walnut_sandbox::{Journal, Layout};

use crate::{images, output};

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Show nothing but the digest
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Platform of the image, as linux/amd64 [default: this host's]
    #[arg(long, value_name = "OS/ARCH")]
    pub(crate) platform: Option<String>,
    /// Image name
    pub(crate) image: String,
}

/// Refuses a platform that no guest here is of.
pub(crate) fn check_platform(platform: &str) -> Result<()> {
    let here = Platform::default();
    let mut parts = platform.split('/');
    let os = parts.next().unwrap_or_default();
    let architecture = parts.next().unwrap_or(&here.architecture);
    let architecture = match architecture {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    if os != here.os || architecture != here.architecture {
        bail!(
            "--platform {platform}: the container's kernel and processor are {here}; leave it out, or give {here}"
        );
    }
    Ok(())
}

/// What a pull shows while it works, on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// Bars on a terminal, a line a step elsewhere.
    Stderr,
    /// Nothing.
    Nothing,
}

pub(crate) async fn pull(args: PullArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    if let Some(platform) = &args.platform {
        check_platform(platform)?;
    }
    let show = if args.quiet {
        Show::Nothing
    } else {
        Show::Stderr
    };
    let image = fetch(&store, &args.image, show).await?;
    Journal::new(&layout.state).other("image", &args.image, "pull");
    if args.quiet {
        println!("{}", image.digest);
    } else {
        println!(
            "{}: {} ({})",
            args.image,
            image.digest,
            output::bytes(image.size)
        );
    }
    Ok(0)
}

/// Fetches an image and shows how it goes.
pub(crate) async fn fetch(store: &Store, name: &str, show: Show) -> Result<Image> {
    let reference: Reference = name.parse()?;
    let bars = Bars::new(show);
    let image = store.pull(&reference, &PullOptions::default(), &bars).await;
    bars.clear();
    Ok(image?)
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut tag debian localhost:5000/base:1 && walnut push localhost:5000/base:1

Logins are those that `docker login` and `podman login` have left.")]
pub(crate) struct PushArgs {
    /// Show nothing but the digest
    #[arg(short, long)]
    quiet: bool,
    /// Image, by the name that it is to have in its registry
    image: String,
}

pub(crate) async fn push(args: PushArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let reference: Reference = args.image.parse()?;
    images::find(&store, &args.image)?;
    let bars = Bars::sending(match args.quiet {
        true => Show::Nothing,
        false => Show::Stderr,
    });
    let pushed = store.push(&reference, &PullOptions::default(), &bars).await;
    bars.clear();
    let digest = pushed?;
    Journal::new(&layout.state).other("image", &args.image, "push");
    println!(
        "{}",
        if args.quiet {
            digest.to_string()
        } else {
            format!("{}: {digest}", args.image)
        }
    );
    Ok(0)
}

pub(crate) struct Bars {
    draw: MultiProgress,
    lines: bool,
    sends: bool,
    bars: Mutex<HashMap<String, ProgressBar>>,
}

impl Bars {
    pub(crate) fn new(show: Show) -> Self {
        Self::of(show, false)
    }

    /// Of a push.
    fn sending(show: Show) -> Self {
        Self::of(show, true)
    }

    fn of(show: Show, sends: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if show == Show::Stderr && terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self {
            draw: MultiProgress::with_draw_target(target),
            lines: show == Show::Stderr && !terminal,
            sends,
            bars: Mutex::default(),
        }
    }

    fn set(&self, key: &str, label: &str, done: u64, total: u64) {
        let Ok(mut bars) = self.bars.lock() else {
            return;
        };
        let bar = bars.entry(key.to_owned()).or_insert_with(|| {
            let bar = self.draw.add(ProgressBar::new(total));
            // The template is constant; a wrong one only loses the look.
            if let Ok(style) = ProgressStyle::with_template(
                "{prefix:20} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec}",
            ) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_prefix(label.to_owned());
            bar
        });
        bar.set_position(done);
        if done >= total {
            bar.abandon();
        }
    }

    fn say(&self, line: &str) {
        if self.lines {
            eprintln!("{line}");
        }
    }

    pub(crate) fn clear(&self) {
        // The bars give way to the result.
        let _ = self.draw.clear();
    }
}

fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..12).unwrap_or(hex)
}

impl Progress for Bars {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Resolved { layers, bytes, .. } => {
                let bytes = output::bytes(bytes);
                self.say(&match self.sends {
                    true => format!("{layers} blobs to send, {bytes}"),
                    false => format!("{layers} layers to fetch, {bytes}"),
                });
            }
            Event::LayerExists { digest, .. } => {
                self.say(&format!("{}: exists", short(&digest.to_string())));
            }
            Event::LayerBytes {
                digest,
                done,
                total,
            } => {
                let name = digest.to_string();
                self.set(&name, short(&name), done, total);
            }
            Event::LayerDone { digest, total } => {
                let name = digest.to_string();
                self.set(&name, short(&name), total, total);
                let done = if self.sends { "sent" } else { "fetched" };
                self.say(&format!("{}: {done}", short(&name)));
            }
            Event::Retry {
                digest,
                attempt,
                reason,
            } => {
                let name = digest.to_string();
                self.say(&format!("{}: retry {attempt}: {reason}", short(&name)));
            }
            Event::Converting { done, total } => self.set("", "to block device", done, total),
            Event::Converted { size } => {
                self.say(&format!("block device: {}", output::bytes(size)));
            }
        }
    }
}
