//! What the agent takes of its guest's memory. `walnut-bench footprint` runs this and holds
//! what it prints against what is recorded.

use std::collections::HashMap;

use serde_json::json;
use tokio::net::UnixStream;
use walnut_protocol::agent::ExecProcessRequest;

use crate::vm::{Vm, context, process, read_until, sh, type_in};

/// Enough that one page more or less is no matter.
const EXECS: u64 = 32;

#[tokio::test]
async fn footprint() {
    let mut vm = Vm::boot().await;
    vm.configure(HashMap::new()).await.unwrap();
    let watch = json!({
        "process": {"capabilities": {"bounding": ["CAP_SYS_PTRACE"], "effective": ["CAP_SYS_PTRACE"], "permitted": ["CAP_SYS_PTRACE"]}},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}], "maskedPaths": [], "readonlyPaths": []},
    });
    let script =
        "while read -r line; do grep -E '^(Rss|Anonymous)' /proc/1/smaps_rollup; echo done; done";
    let [mut ask, mut answers, _errors] = vm.run(Vm::request("c", sh(script), &watch)).await;
    let resident = look(&mut ask, &mut answers).await["Rss:"];
    let mut kept = Vec::new();
    // The first has the agent touch what the others find touched.
    kept.push(exec(&mut vm, 0).await);
    let before = look(&mut ask, &mut answers).await["Anonymous:"];
    for number in 1..=EXECS {
        kept.push(exec(&mut vm, number).await);
    }
    let after = look(&mut ask, &mut answers).await["Anonymous:"];
    println!("agent resident: {resident} kB");
    let bytes = after.saturating_sub(before) * 1024 / EXECS;
    println!("agent per exec: {bytes} bytes");
}

/// An exec that stays, and its streams.
async fn exec(vm: &mut Vm, number: u64) -> [UnixStream; 3] {
    let (stdio, streams) = vm.stdio().await;
    let request = ExecProcessRequest {
        container_id: "c".into(),
        exec_id: format!("e{number}"),
        process: serde_json::to_vec(&process(&["sleep", "1000"])).unwrap(),
        stdio: Some(stdio).into(),
        ..ExecProcessRequest::default()
    };
    vm.agent.exec_process(context(), &request).await.unwrap();
    streams
}

/// The agent's rows of /proc, kB.
async fn look(ask: &mut UnixStream, answers: &mut UnixStream) -> HashMap<String, u64> {
    type_in(ask, "\n").await;
    let text = read_until(answers, "done\n").await;
    let row = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    text.lines().filter_map(row).collect()
}
