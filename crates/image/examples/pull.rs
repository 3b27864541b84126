//! Pulls an image into a store and shows what came of it:
//! `cargo run --release -p walnut-image --example pull -- <store> <reference>`

use std::{error::Error, time::Instant};

use walnut_image::{Event, Progress, PullOptions, Reference, Store};

struct Lines;

impl Progress for Lines {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::LayerBytes { .. } | Event::Converting { .. } => {}
            other => eprintln!("{other:?}"),
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(root), Some(name)) = (args.next(), args.next()) else {
        return Err("usage: pull <store> <reference>".into());
    };
    let reference: Reference = name.parse()?;
    let start = Instant::now();
    let image = Store::open(root)?
        .pull(&reference, &PullOptions::default(), &Lines)
        .await?;
    println!(
        "{} {} {} bytes in {:.2?}\n{}",
        image.id.short(),
        reference.familiar(),
        image.size,
        start.elapsed(),
        image.rootfs.display()
    );
    Ok(())
}
