//! Virtio device models, free of any hypervisor.
//!
//! A device owns its virtqueues and works on guest memory that it is handed; who
//! maps that memory, delivers kicks and raises interrupts is the caller's matter:
//! `walnut-vmm` does it in process, `walnut-vsock` over vhost-user for QEMU.
//!
//! Main types: [`virtio::Device`], what all have in common, and [`virtio::Worker`],
//! the thread of one; [`block::Block`], [`rng::Rng`] and [`balloon::Balloon`];
//! [`vsock::Device`], the guest-host socket device;
//! [`vhost::Frontend`], a device that another process serves; [`pci::Root`], the bus
//! on which a guest of `walnut-vmm` finds them.
//!
//! This crate must never know KVM, containers or sandboxes. Everything read from
//! guest memory is hostile.

pub mod balloon;
pub mod block;
pub mod fs;
pub mod limit;
mod log;
pub mod mem;
pub mod net;
pub mod pci;
pub mod rng;
pub mod vhost;
pub mod virtio;
pub mod vsock;

pub use log::Log;
