use super::*;

fn store(dir: &tempfile::TempDir) -> Templates {
    let (state, run) = (dir.path().join("s"), dir.path().join("r"));
    private_dir(&state).unwrap();
    private_dir(&run).unwrap();
    let templates = Templates::new(&state, &run);
    drop(templates.lock().unwrap());
    templates
}

/// A template of a driver's shape, with files of its own.
fn put(templates: &Templates, driver: &str) -> String {
    let mut shape: Shape = serde_json::from_value(serde_json::json!({
        "format": 3, "walnut": env!("CARGO_PKG_VERSION"), "driver": driver, "memory": 1,
        "vcpus": 1, "max_memory": 2, "max_vcpus": 2, "spare_disks": 1, "cmdline": [], "files": [],
        "host": { "id": "", "kernel": "", "processor": "" },
    }))
    .unwrap();
    shape.driver = driver.to_owned();
    let id = shape.id();
    fs::create_dir(templates.path(&id)).unwrap();
    let files = templates.files(&id);
    fs::write(&files.state, "state").unwrap();
    fs::write(&files.memory, "memory").unwrap();
    let template = Template {
        id: id.clone(),
        created_at: 1,
        shape,
        state: Stamp::of(&files.state).unwrap(),
        memory: Stamp::of(&files.memory).unwrap(),
    };
    let json = serde_json::to_vec(&template).unwrap();
    fs::write(templates.path(&id).join(META), json).unwrap();
    id
}

#[test]
fn a_template_of_another_host_is_listed_as_stale() {
    let dir = tempfile::tempdir().unwrap();
    let templates = store(&dir);
    let id = put(&templates, "vmm");
    let listed = templates.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].template.id, id);
    assert!(listed[0].size > 0);
    let stale = listed[0].stale.as_deref().unwrap();
    assert!(stale.contains("another host"), "{stale}");
    templates.remove_stale().unwrap();
    assert!(templates.list().unwrap().is_empty());
    templates.remove(&id).unwrap();
}

#[test]
fn what_was_changed_or_cut_or_is_elsewhere_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let templates = store(&dir);
    let id = put(&templates, "vmm");
    assert!(templates.load(&id).is_ok());
    // Under another name.
    let other = "0".repeat(32);
    fs::rename(templates.path(&id), templates.path(&other)).unwrap();
    let said = templates.load(&other).unwrap_err().to_string();
    assert!(said.contains("another template's"), "{said}");
    fs::rename(templates.path(&other), templates.path(&id)).unwrap();

    fs::write(templates.files(&id).memory, "memory that is longer").unwrap();
    let said = templates.load(&id).unwrap_err().to_string();
    assert!(said.contains("changed after"), "{said}");
    fs::remove_dir_all(templates.path(&id)).unwrap();

    let id = put(&templates, "vmm");
    fs::remove_file(templates.files(&id).state).unwrap();
    assert!(templates.load(&id).is_err());
    fs::remove_dir_all(templates.path(&id)).unwrap();

    let id = put(&templates, "vmm");
    for bytes in [&b""[..], b"{", b"{}", b"[1]", &[0xff; 9]] {
        fs::write(templates.path(&id).join(META), bytes).unwrap();
        assert!(templates.load(&id).is_err());
    }
    assert!(templates.list().unwrap().is_empty());
}

#[test]
fn what_a_killed_maker_left_is_swept_unless_one_is_at_work() {
    let dir = tempfile::tempdir().unwrap();
    let templates = store(&dir);
    let id = put(&templates, "vmm");
    let left = templates.dir.join(format!("{UNFINISHED}{id}"));
    let run = templates.run.join(RUN_DIR);
    for path in [&left, &run] {
        fs::create_dir(path).unwrap();
        fs::write(path.join("x"), "x").unwrap();
    }
    let lock = templates.lock().unwrap().unwrap();
    templates.sweep().unwrap();
    assert!(left.exists() && run.exists());
    let waits = std::thread::spawn({
        let templates = templates.clone();
        move || templates.wait_for_maker()
    });
    drop(lock);
    waits.join().unwrap().unwrap();
    templates.sweep().unwrap();
    assert!(!left.exists() && !run.exists());
    assert!(templates.load(&id).is_ok());
}

#[tokio::test]
async fn one_waits_for_its_turn_per_shape() {
    let dir = tempfile::tempdir().unwrap();
    let templates = store(&dir);
    let held = templates.lock().unwrap().unwrap();
    let waits = |id: &'static str| {
        let templates = templates.clone();
        tokio::spawn(async move { templates.lock_in_turn(id).await })
    };
    let place = |id: &str| templates.dir.join(format!("{WAITING}{id}"));
    let taken = |id: &str| place(id).exists() && Lock::try_take(&place(id)).unwrap().is_none();
    let (one, other) = (waits("one"), waits("other"));
    while !taken("one") || !taken("other") {
        tokio::task::yield_now().await;
    }
    assert!(waits("one").await.unwrap().unwrap().is_none());
    drop(held);
    // Each when the one before has ended, in whatever order.
    let made = async |waiter: tokio::task::JoinHandle<Result<Option<Lock>>>| {
        drop(waiter.await.unwrap().unwrap().unwrap());
    };
    tokio::join!(made(one), made(other));
    assert!(place("one").exists());
    templates.sweep().unwrap();
    assert!(!place("one").exists() && !place("other").exists());
}

#[test]
fn the_one_not_used_for_longest_makes_room() {
    let dir = tempfile::tempdir().unwrap();
    let templates = store(&dir);
    let ids: Vec<_> = (0..TEMPLATES_MAX as u64)
        .map(|n| {
            let id = put(&templates, &format!("driver-{n}"));
            let used = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(100 - n);
            let times = fs::FileTimes::new().set_modified(used);
            let meta = fs::File::open(templates.path(&id).join(META)).unwrap();
            meta.set_times(times).unwrap();
            id
        })
        .collect();
    templates.evict().unwrap();
    let left = templates.ids().unwrap();
    assert_eq!(left.len(), TEMPLATES_MAX - 1);
    assert!(!left.contains(ids.last().unwrap()));
}
