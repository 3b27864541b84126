//! The network that was made for a container.

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

/// The network namespace that the container's PID shall be in; none is the host's own.
pub(super) fn namespace(spec: &Spec) -> Option<&LinuxNamespace> {
    let linux = spec.linux().as_ref()?;
    let listed = linux.namespaces().as_deref().unwrap_or_default();
    listed
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
}
