//! Prints what the KVM probe finds: five times, to show what a warm probe costs.

fn main() {
    for _ in 0..5 {
        let start = std::time::Instant::now();
        let status = walnut_machine::kvm_probe::probe();
        println!("{status} [{:?}]", start.elapsed());
    }
}
