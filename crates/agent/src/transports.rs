//! Devices that a machine has been given without a word: one without hot-plug has
//! transports (virtio over MMIO) that were empty when its kernel looked, and are not any
//! more in a clone.

use std::fs;
use std::path::Path;

/// Where the kernel has transports, and their driver.
const PLATFORM: &str = "/sys/bus/platform";
const DRIVER: &str = "virtio-mmio";

/// Lets the kernel look again at transports that were empty. One that still is stays so.
pub fn look_again() {
    let platform = Path::new(PLATFORM);
    // Machines that announce their devices have no such driver.
    let Ok(devices) = fs::read_dir(platform.join("devices")) else {
        return;
    };
    let bind = platform.join("drivers").join(DRIVER).join("bind");
    for device in devices.flatten() {
        let name = device.file_name();
        let is_transport = name.to_string_lossy().starts_with(DRIVER);
        if is_transport && !device.path().join("driver").exists() {
            let _ = fs::write(&bind, name.as_encoded_bytes());
        }
    }
}
