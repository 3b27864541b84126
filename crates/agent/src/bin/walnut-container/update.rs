//! Changes a container's limits.

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use libcontainer::oci_spec::runtime::LinuxResources;
use protobuf::Message;
use walnut_agent::names::ContainerPaths;
use walnut_protocol::agent::UpdateContainerRequest;

use crate::failure::Failure;
use crate::link::Done;
use crate::spec::adapt_resources;

/// Applies `linux.resources` to the container's cgroup.
pub(crate) fn update(payload: &[u8]) -> Result<Done, Failure> {
    let request = UpdateContainerRequest::parse_from_bytes(payload)
        .map_err(|e| Failure::invalid(format!("update request: {e}")))?;
    let paths =
        ContainerPaths::new(&request.container_id).map_err(|e| Failure::invalid(e.to_string()))?;
    let mut resources: LinuxResources = serde_json::from_slice(&request.resources)
        .map_err(|e| Failure::invalid(format!("resources for {}: {e}", paths.id())))?;
    adapt_resources(&mut resources);
    let what = || format!("update limits of container {}", paths.id());
    let manager = create_cgroup_manager(CgroupConfig {
        cgroup_path: paths.cgroup_in_hierarchy(),
        systemd_cgroup: false,
        container_name: paths.id().to_owned(),
    })
    .map_err(|e| Failure::internal(what(), e))?;
    manager
        .apply(&ControllerOpt {
            resources: &resources,
            freezer_state: None,
            oom_score_adj: None,
            disable_oom_killer: false,
        })
        // What the kernel refuses here are the caller's values.
        .map_err(|e| Failure::invalid(format!("{}: {e}", what())))?;
    Ok(Done::default())
}
