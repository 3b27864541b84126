//! What the agent does around the saving of its machine, without the saving.

use serde_json::json;
use tokio::io::AsyncReadExt;
use ttrpc::Code;
use walnut_protocol::agent::{
    AdoptContainerRequest, Empty, ExecProcessRequest, GuestFile, Stdio as Streams,
};

use crate::{
    code,
    vm::{Vm, container, context, read_until, sh, type_in},
};

fn adopt(streams: Streams) -> AdoptContainerRequest {
    AdoptContainerRequest {
        container_id: "c".into(),
        stdio: Some(streams).into(),
        hostname: "clone".into(),
        ..AdoptContainerRequest::default()
    }
}

#[tokio::test]
async fn streams_are_held_and_others_take_their_place() {
    let mut vm = Vm::boot().await;
    let script = "while read word; do echo $word; hostname; cat /etc/name; done; echo over; exit 6";
    let mount = json!({ "destination": "/etc/name", "type": "bind", "options": ["bind"],
                        "source": "/run/walnut/c/files/name" });
    let mut request = Vm::request("c", sh(script), &json!({}));
    let mut spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
    spec["mounts"].as_array_mut().unwrap().push(mount);
    request.spec = serde_json::to_vec(&spec).unwrap();
    let file = |path: &str, text: &str| GuestFile {
        path: path.into(),
        data: text.into(),
        mode: 0o644,
        ..GuestFile::default()
    };
    request.files = vec![file("/run/walnut/c/files/name", "first\n")];
    let [mut input, mut output, _errors] = vm.run(request).await;
    type_in(&mut input, "one\n").await;
    read_until(&mut output, "one\ncontainer\nfirst\n").await;
    let (streams, [_, mut exec, _]) = vm.stdio().await;
    let request = ExecProcessRequest {
        container_id: "c".into(),
        exec_id: "e".into(),
        process: serde_json::to_vec(&sh("while :; do echo x; sleep 0.01; done")).unwrap(),
        stdio: Some(streams).into(),
        ..ExecProcessRequest::default()
    };
    vm.agent.exec_process(context(), &request).await.unwrap();
    read_until(&mut exec, "x").await;

    let nothing = Empty::default();
    vm.agent.hold_streams(context(), &nothing).await.unwrap();
    // Read, and answered: but the answer stays where it is.
    type_in(&mut input, "two\n").await;
    for path in ["/run/walnut/d/x", "/etc/passwd", "/run/walnut/c/../x"] {
        let mut bad = adopt(Streams::default());
        bad.files = vec![file(path, "x")];
        let refused = code(vm.agent.adopt_container(context(), &bad).await);
        assert_eq!(refused.0, Code::INVALID_ARGUMENT, "{path}: {}", refused.1);
    }
    let mut bad = adopt(Streams::default());
    bad.container_id = "d".into();
    let refused = code(vm.agent.adopt_container(context(), &bad).await);
    assert_eq!(refused.0, Code::NOT_FOUND);

    let (streams, [mut next_input, mut next_output, mut next_errors]) = vm.stdio().await;
    let mut good = adopt(streams);
    good.files = vec![file("/run/walnut/c/files/name", "second\n")];
    let reply = vm.agent.adopt_container(context(), &good).await.unwrap();
    assert!(reply.pid > 1);
    vm.agent.release_streams(context(), &nothing).await.unwrap();
    // Said before or after the change of names, once, and to the next stream.
    let text = read_until(&mut next_output, "two\n").await;
    assert_eq!(text, "two\n");
    read_until(&mut next_output, "\n").await;
    read_until(&mut next_output, "\n").await;
    type_in(&mut next_input, "three\n").await;
    let text = read_until(&mut next_output, "second\n").await;
    assert_eq!(text, "three\nclone\nsecond\n");
    // The first streams are closed, and the exec's, whose name is free.
    let mut rest = String::new();
    output.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "");
    exec.read_to_string(&mut rest).await.unwrap();
    let again = vm.exec("c", "e", sh("echo free; exit 3")).await;
    assert_eq!(again, ("free\n".to_owned(), 3));

    drop(next_input);
    let text = read_until(&mut next_output, "over\n").await;
    assert_eq!(text, "over\n");
    assert_eq!(vm.wait("c", "").await.exit_code, 6);
    next_errors.read_to_string(&mut rest).await.unwrap();
    vm.agent
        .remove_container(context(), &container("c"))
        .await
        .unwrap();
}
