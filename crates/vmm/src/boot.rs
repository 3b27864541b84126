//! The kernel in guest memory, and how the first vCPU meets it.
//!
//! Two ways, both in 32-bit protected mode without paging: an ELF kernel by its
//! PVH note (xen.git docs/misc/pvh.pandoc), a bzImage by the 32-bit boot protocol
//! (Documentation/arch/x86/boot.rst §1.12).

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
};

use linux_loader::{
    configurator::{
        BootConfigurator, BootParams, linux::LinuxBootConfigurator, pvh::PvhBootConfigurator,
    },
    loader::{
        BzImage, Elf, KernelLoader, KernelLoaderResult,
        bootparam::{boot_e820_entry, boot_params},
        elf::{
            PvhBootCapability,
            start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
        },
    },
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use walnut_devices::virtio::Memory;

use crate::{Error, layout};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PVH_MAGIC: u32 = 0x336e_c578;
/// Number of the boot loader that has none (boot.rst, `type_of_loader`).
const UNKNOWN_LOADER: u8 = 0xff;

/// How the first vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) rip: u64,
    /// The PVH start information.
    pub(crate) rbx: u64,
    /// The zero page.
    pub(crate) rsi: u64,
}

/// A piece of the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    start: u64,
    len: u64,
    kind: u32,
}

/// What is loaded.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) kernel: File,
    pub(crate) initramfs: Option<File>,
    pub(crate) cmdline: &'a str,
    pub(crate) rsdp: GuestAddress,
}

fn bad(what: &str) -> impl Fn(&dyn std::fmt::Display) -> Error {
    move |e| Error::Boot(format!("{what}: {e}"))
}

impl Boot<'_> {
    /// Loads everything.
    pub(crate) fn load(mut self, memory: &Memory) -> Result<Entry, Error> {
        self.write_cmdline(memory)?;
        let mut magic = [0; 4];
        self.kernel
            .read_exact(&mut magic)
            .map_err(|e| bad("read the kernel")(&e))?;
        let high = Some(GuestAddress(layout::HIGH_RAM));
        if magic == *b"\x7fELF" {
            let loaded = Elf::load(memory, None, &mut self.kernel, high)
                .map_err(|e| bad("load the kernel")(&e))?;
            self.pvh(memory, &loaded)
        } else {
            let loaded = BzImage::load(memory, None, &mut self.kernel, high).map_err(|e| {
                bad("load the kernel, which is neither ELF nor a bzImage that would do")(&e)
            })?;
            self.linux(memory, &loaded)
        }
    }

    fn write_cmdline(&self, memory: &Memory) -> Result<(), Error> {
        if self.cmdline.len() >= layout::CMDLINE_MAX || self.cmdline.contains('\0') {
            return Err(Error::Boot(format!(
                "the kernel command line must be shorter than {} bytes and hold no NUL",
                layout::CMDLINE_MAX
            )));
        }
        let line = [self.cmdline.as_bytes(), b"\0"].concat();
        memory
            .write_slice(&line, layout::CMDLINE)
            .map_err(|e| bad("write the kernel command line")(&e))
    }

    /// Puts the initramfs at the end of low memory; where, and how long it is.
    fn load_initramfs(
        &mut self,
        memory: &Memory,
        kernel_end: u64,
    ) -> Result<Option<(u64, u64)>, Error> {
        let Some(file) = &mut self.initramfs else {
            return Ok(None);
        };
        let size = file
            .seek(SeekFrom::End(0))
            .and_then(|size| file.rewind().map(|()| size))
            .map_err(|e| bad("size the initramfs")(&e))?;
        let low_end = memory
            .find_region(GuestAddress(0))
            .map_or(0, |region| region.len());
        let at = low_end
            .checked_sub(size)
            .map(|at| at & !0xfff)
            .filter(|at| *at >= kernel_end)
            .ok_or_else(|| {
                Error::Boot(format!(
                    "{low_end} bytes of memory do not hold the kernel and an initramfs of {size} bytes; \
                     give the machine more memory"
                ))
            })?;
        let len = usize::try_from(size).map_err(|e| bad("size the initramfs")(&e))?;
        memory
            .read_exact_volatile_from(GuestAddress(at), file, len)
            .map_err(|e| bad("load the initramfs")(&e))?;
        Ok(Some((at, size)))
    }

    fn pvh(&mut self, memory: &Memory, loaded: &KernelLoaderResult) -> Result<Entry, Error> {
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            return Err(Error::Boot(
                "the kernel has no PVH entry; build it with CONFIG_PVH, or give a bzImage".into(),
            ));
        };
        let initramfs = self.load_initramfs(memory, loaded.kernel_end)?;
        let map: Vec<_> = memory_map(memory)
            .into_iter()
            .map(|piece| hvm_memmap_table_entry {
                addr: piece.start,
                size: piece.len,
                type_: piece.kind,
                reserved: 0,
            })
            .collect();
        let modules: Vec<_> = initramfs
            .into_iter()
            .map(|(paddr, size)| hvm_modlist_entry {
                paddr,
                size,
                ..Default::default()
            })
            .collect();
        let start_info = hvm_start_info {
            magic: PVH_MAGIC,
            version: 1,
            nr_modules: u32::from(initramfs.is_some()),
            modlist_paddr: layout::MODULES.raw_value(),
            cmdline_paddr: layout::CMDLINE.raw_value(),
            rsdp_paddr: self.rsdp.raw_value(),
            memmap_paddr: layout::MEMORY_MAP.raw_value(),
            memmap_entries: u32::try_from(map.len()).unwrap_or(0),
            ..Default::default()
        };
        let mut params = BootParams::new(&start_info, layout::START_INFO);
        params.set_sections(&map, layout::MEMORY_MAP);
        params.set_modules(&modules, layout::MODULES);
        PvhBootConfigurator::write_bootparams(&params, memory)
            .map_err(|e| bad("write the PVH start information")(&e))?;
        Ok(Entry {
            rip: entry.raw_value(),
            rbx: layout::START_INFO.raw_value(),
            rsi: 0,
        })
    }

    fn linux(&mut self, memory: &Memory, loaded: &KernelLoaderResult) -> Result<Entry, Error> {
        let header = loaded
            .setup_header
            .ok_or_else(|| Error::Boot("the bzImage has no header".into()))?;
        // It unpacks itself over what follows it: `init_size` says how far.
        let from = u64::from(header.code32_start).max(header.pref_address);
        let end = loaded.kernel_end.max(from + u64::from(header.init_size));
        let initramfs = self.load_initramfs(memory, end)?;
        let mut params = boot_params {
            hdr: header,
            acpi_rsdp_addr: self.rsdp.raw_value(),
            ..Default::default()
        };
        params.hdr.type_of_loader = UNKNOWN_LOADER;
        params.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE.raw_value()).unwrap_or(0);
        params.hdr.cmdline_size = u32::try_from(self.cmdline.len()).unwrap_or(0);
        if let Some((at, size)) = initramfs {
            // Below 3 GiB, by construction.
            params.hdr.ramdisk_image = u32::try_from(at).unwrap_or(0);
            params.hdr.ramdisk_size = u32::try_from(size).unwrap_or(0);
        }
        let map = memory_map(memory);
        params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
        for (entry, piece) in params.e820_table.iter_mut().zip(&map) {
            *entry = boot_e820_entry {
                addr: piece.start,
                size: piece.len,
                r#type: piece.kind,
            };
        }
        let params = BootParams::new(&params, layout::ZERO_PAGE);
        LinuxBootConfigurator::write_bootparams(&params, memory)
            .map_err(|e| bad("write the zero page")(&e))?;
        Ok(Entry {
            rip: loaded.kernel_load.raw_value(),
            rbx: 0,
            rsi: layout::ZERO_PAGE.raw_value(),
        })
    }
}

/// The map of all RAM, with a hole for the ACPI tables.
fn memory_map(memory: &Memory) -> Vec<Piece> {
    let acpi = layout::ACPI.raw_value();
    let mut pieces = vec![
        Piece {
            start: 0,
            len: layout::CONVENTIONAL_END,
            kind: E820_RAM,
        },
        Piece {
            start: acpi,
            len: layout::HIGH_RAM - acpi,
            kind: E820_RESERVED,
        },
    ];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        let start = start.max(layout::HIGH_RAM);
        pieces.push(Piece {
            start,
            len: end.saturating_sub(start),
            kind: E820_RAM,
        });
    }
    pieces
}
