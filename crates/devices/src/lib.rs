//! Virtio device models, free of any hypervisor.
//!
//! A device owns its virtqueues and works on guest memory that it is handed; who
//! maps that memory, delivers kicks and raises interrupts is the caller's matter:
//! `walnut-vmm` does it in process, `walnut-vsock` over vhost-user for QEMU.
//!
//! Main types: [`vsock::Device`], the guest-host socket device, and
//! [`vsock::Config`], what it is made of.
//!
//! This crate must never know KVM, vhost-user (only its programs do), containers
//! or sandboxes. Everything read from guest memory is hostile.

pub mod block;
pub mod limit;
mod log;
pub mod virtio;
pub mod vsock;

pub use log::Log;
