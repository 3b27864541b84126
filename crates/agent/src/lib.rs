//! What the two programs of the guest share.
//!
//! `walnut-agent` is init and serves the control protocol; `walnut-container`
//! is its helper, a single-threaded process per request that mounts storages
//! and builds containers. They talk over one socket ([`wire`]) and agree on
//! [`names`] and places. Main types: [`wire::Request`], [`wire::Reply`],
//! [`names::ContainerPaths`]. This library must never know ttrpc, a runtime or
//! libcontainer: the agent links it and has to stay small.

pub mod names;
pub mod transports;
pub mod wire;

/// Where the helper lies in the guest.
pub const HELPER: &str = "/walnut-container";
