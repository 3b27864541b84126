//! The ACPI tables (6.5, hardware-reduced): processors, the PCI root, the serial
//! port, and how a guest resets its machine. A table says only what a guest
//! cannot find out otherwise.

mod ged;
pub(crate) mod generation;
mod hotplug;

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, IO, Interrupt, Method, Name,
        Path, ResourceTemplate, Return, Scope,
    },
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace::SystemIo, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Address, Bytes, GuestAddress};
use walnut_devices::virtio::Memory;

use self::ged::{Event, Ged};
use crate::{Error, layout, ports};

const OEM: [u8; 6] = *b"WALNUT";
const TABLE: [u8; 8] = *b"WALNUTVM";

/// What the tables tell.
#[derive(Debug, Clone)]
pub(crate) struct Tables {
    /// vCPUs that there are. The guest brings those online that it boots with
    /// (`maxcpus=`), and the others when it is asked to: without ACPI's hot-plug, what
    /// may ever be there is there from the start.
    pub(crate) vcpus: u8,
    /// The last PCI bus.
    pub(crate) last_bus: u8,
    /// The 64-bit window for BARs.
    pub(crate) window64: std::ops::Range<u64>,
}

impl Tables {
    /// Writes the tables; returns the address of the root pointer.
    pub(crate) fn write(&self, memory: &Memory) -> Result<GuestAddress, Error> {
        let mut at = Writer {
            memory,
            next: layout::ACPI.unchecked_add(64),
        };
        let dsdt = at.put(&self.dsdt())?;
        let fadt = at.put(&fadt(dsdt))?;
        let madt = at.put(&self.madt())?;
        let mcfg = at.put(&self.mcfg())?;
        let mut xsdt = XSDT::new(OEM, TABLE, 1);
        for table in [fadt, madt, mcfg] {
            xsdt.add_entry(table.raw_value());
        }
        let xsdt = at.put(&xsdt)?;
        at.next = layout::ACPI;
        at.put(&Rsdp::new(OEM, xsdt.raw_value()))
    }

    fn madt(&self) -> MADT {
        let mut madt = MADT::new(
            OEM,
            TABLE,
            1,
            LocalInterruptController::Address(layout::LOCAL_APIC),
        );
        for id in 0..self.vcpus {
            madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
        }
        madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
        madt
    }

    fn mcfg(&self) -> MCFG {
        let mut mcfg = MCFG::new(OEM, TABLE, 1);
        mcfg.add_ecam(layout::ECAM, 0, 0, self.last_bus);
        mcfg
    }

    fn dsdt(&self) -> Sdt {
        let mut body = Vec::new();
        self.pci().to_aml_bytes(&mut body);
        let ged = Ged::new(self.events());
        let generation = generation::device();
        Scope::new(Path::new("_SB_"), vec![&generation, &ged]).to_aml_bytes(&mut body);
        let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
        dsdt.append_slice(&body);
        dsdt
    }

    /// What a guest hears of while it runs.
    fn events(&self) -> Vec<Event> {
        vec![hotplug::event(), generation::event()]
    }

    /// `\_SB`: the PCI host bridge, what its ECAM takes, and the serial port.
    fn pci(&self) -> impl Aml {
        Raw(self.system_bus())
    }

    fn system_bus(&self) -> Vec<u8> {
        let ecam_size = (u32::from(self.last_bus) + 1) << 20;
        let hid_host = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
        let cid_host = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
        // The guest may have all of PCI Express: hot-plug above all.
        let granted = Return::new(&Arg(3));
        let control = Method::new("_OSC".into(), 4, true, vec![&granted]);
        let segment = Name::new("_SEG".into(), &0u8);
        let bus = Name::new("_BBN".into(), &0u8);
        let host_uid = Name::new("_UID".into(), &0u8);
        let buses = AddressSpace::new_bus_number(0u16, u16::from(self.last_bus));
        let (start32, end32) = (
            u32::try_from(layout::WINDOW32.start).unwrap_or(0),
            u32::try_from(layout::WINDOW32.end - 1).unwrap_or(0),
        );
        let window32 = AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            start32,
            end32,
            None,
        );
        let window64 = AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            self.window64.start,
            self.window64.end - 1,
            None,
        );
        let host_resources = ResourceTemplate::new(vec![&buses, &window32, &window64]);
        let host_resources = Name::new("_CRS".into(), &host_resources);
        let slots = Raw(hotplug::slots());
        let host = Device::new(
            Path::new("PCI0"),
            vec![
                &hid_host,
                &cid_host,
                &host_uid,
                &control,
                &segment,
                &bus,
                &host_resources,
                &slots,
            ],
        );

        // Linux uses an ECAM only if a motherboard resource claims it.
        let board_hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
        let board_uid = Name::new("_UID".into(), &1u8);
        let ecam = acpi_tables::aml::Memory32Fixed::new(
            true,
            u32::try_from(layout::ECAM).unwrap_or(0),
            ecam_size,
        );
        let board_resources = ResourceTemplate::new(vec![&ecam]);
        let board_resources = Name::new("_CRS".into(), &board_resources);
        let board = Device::new(
            Path::new("MBRD"),
            vec![&board_hid, &board_uid, &board_resources],
        );

        let serial_hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
        let serial_uid = Name::new("_UID".into(), &0u8);
        let io = IO::new(ports::SERIAL, ports::SERIAL, 1, 8);
        let irq = Interrupt::new(true, true, false, false, ports::SERIAL_IRQ);
        let serial_resources = ResourceTemplate::new(vec![&io, &irq]);
        let serial_resources = Name::new("_CRS".into(), &serial_resources);
        let serial = Device::new(
            Path::new("COM1"),
            vec![&serial_hid, &serial_uid, &serial_resources],
        );

        let mut bytes = Vec::new();
        Scope::new(Path::new("_SB_"), vec![&host, &board, &serial]).to_aml_bytes(&mut bytes);
        bytes
    }
}

/// AML that has been written already.
#[derive(Debug, Clone)]
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn fadt(dsdt: GuestAddress) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt.raw_value())
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    fadt.reset_reg = GAS::new(
        SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(ports::RESET),
    );
    fadt.reset_value = ports::RESET_VALUE;
    // No VGA to probe for, no clock chip.
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    fadt.finalize()
}

/// Writes tables one after the other, below the end of the area.
struct Writer<'a> {
    memory: &'a Memory,
    next: GuestAddress,
}

impl Writer<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<GuestAddress, Error> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = self.next;
        let end = at.unchecked_add(bytes.len() as u64);
        if end.raw_value() > layout::HIGH_RAM {
            return Err(Error::Boot("the ACPI tables do not fit".to_owned()));
        }
        self.memory
            .write_slice(&bytes, at)
            .map_err(|e| Error::Boot(format!("write the ACPI tables: {e}")))?;
        self.next = GuestAddress(end.raw_value().next_multiple_of(16));
        Ok(at)
    }
}
