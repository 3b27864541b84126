use std::{
    fs::File,
    os::{fd::AsFd, unix::net::UnixListener},
};

use super::*;

fn pools() -> (tempfile::TempDir, Pools) {
    let dir = tempfile::tempdir().unwrap();
    let pools = Pools::new(dir.path(), dir.path());
    (dir, pools)
}

fn wanted(memory: u64) -> Wanted {
    Wanted {
        driver: DriverChoice::Auto,
        memory,
        vcpus: 1,
    }
}

#[test]
fn what_is_wanted_is_kept() {
    let (dir, pools) = pools();
    assert!(!pools.is_wanted() && pools.sizes().unwrap().is_empty());
    pools.set(&wanted(1), 3).unwrap();
    pools.set(&wanted(2), 1).unwrap();
    pools.set(&wanted(1), 2).unwrap();
    let sizes: Vec<_> = pools.sizes().unwrap();
    let mut sizes: Vec<_> = sizes.iter().map(|p| (p.memory, p.size)).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [(1, 2), (2, 1)]);
    pools.set(&wanted(1), 0).unwrap();
    assert_eq!(pools.sizes().unwrap().len(), 1);
    let said = pools.set(&wanted(1), MEMBERS_MAX).unwrap_err().to_string();
    assert!(said.contains("keeps 1024 at most"), "{said}");
    assert!(pools.is_wanted());
    pools.set(&wanted(2), 0).unwrap();
    pools.set(&wanted(2), 0).unwrap();
    assert!(!pools.is_wanted() && pools.sizes().unwrap().is_empty());

    for (text, why) in [
        ("{", "EOF"),
        ("{\"version\": 2, \"pools\": []}", "of format 2"),
        ("{\"version\": 1, \"pools\": [{}]}", "missing field"),
    ] {
        fs::write(dir.path().join("pool.json"), text).unwrap();
        let said = pools.sizes().unwrap_err().to_string();
        assert!(said.contains(why), "{said}");
    }
}

#[tokio::test]
async fn members_count_while_their_process_lives() {
    let (_dir, pools) = pools();
    pools.set(&wanted(1), 2).unwrap();
    let lib = Path::new("/lib");
    let one = pools.place(&wanted(1), lib).unwrap();
    let other = pools.place(&wanted(2), lib).unwrap();
    let (missing, excess) = pools.balance(|_| None).unwrap();
    assert_eq!(missing, [wanted(1)]);
    assert_eq!(excess.len(), 1);
    assert_eq!(excess[0].id, other.id);
    drop(other);
    assert_eq!(pools.members().unwrap().len(), 1);
    // Of a template that is another's by now.
    drop(pools.offer(&one, "old", (1, 1)).unwrap());
    let new = |_: &Wanted| Some("new".to_owned());
    let (missing, excess) = pools.balance(new).unwrap();
    assert_eq!((missing.len(), excess.len()), (2, 1));
    // Taken: its directory stays, and it is none of the pool.
    leave(&one.dir);
    assert!(pools.members().unwrap().is_empty() && one.dir.exists());
    let dir = one.dir.clone();
    drop(one);
    pools.sweep().unwrap();
    assert!(!dir.exists());
}

#[test]
fn a_member_that_grows_serves_what_it_can_grow_to() {
    let (_dir, pools) = pools();
    let place = pools.place(&wanted(4), Path::new("/lib")).unwrap();
    let mut member = pools.members().unwrap().remove(0);
    assert_eq!(member.id, place.id);
    let serves = |member: &Member, memory, vcpus| {
        let wanted = Wanted {
            vcpus,
            ..wanted(memory)
        };
        member.serves(&wanted)
    };
    // Of a driver whose machines do not: its own size.
    for (memory, own) in [(3, false), (4, true), (5, false)] {
        assert_eq!(serves(&member, memory, 1), own);
    }
    (member.max_memory, member.max_vcpus) = (8, 2);
    for (memory, vcpus, right) in [
        (4, 1, true),
        (8, 2, true),
        (3, 1, false),
        (9, 1, false),
        (4, 3, false),
    ] {
        assert_eq!(serves(&member, memory, vcpus), right, "{memory} {vcpus}");
    }
}

/// The descriptors of a container, of which nothing is used here.
fn fds(dir: &Path) -> Vec<File> {
    (0..5)
        .map(|n| File::create(dir.join(n.to_string())).unwrap())
        .collect()
}

fn handover() -> Handover {
    Handover {
        id: "c".into(),
        container_dir: "/c".into(),
        run_dir: "/r".into(),
    }
}

#[tokio::test]
async fn a_container_is_handed_to_who_is_there() {
    let (dir, pools) = pools();
    let lib = Path::new("/lib");
    let take = async |memory: u64, lib: &'static Path| {
        let (pools, dir) = (pools.clone(), dir.path().to_owned());
        let take = move || {
            let fds = fds(&dir);
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            pools.take(&wanted(memory), lib, &handover(), &fds).unwrap()
        };
        tokio::task::spawn_blocking(take).await.unwrap()
    };
    assert_eq!(take(1, lib).await, None);
    let place = pools.place(&wanted(1), lib).unwrap();
    // Not ready yet, of another size, of another installation.
    assert_eq!(take(1, lib).await, None);
    let post = Post::open(&place.dir).unwrap();
    assert!(pools.members().unwrap()[0].ready);
    assert_eq!(take(2, lib).await, None);
    assert_eq!(take(1, Path::new("/other")).await, None);

    let serve = async {
        let (visit, visitor) = post.visit().await.unwrap();
        assert!(matches!(visit, Visit::Given(_)));
        visitor.refuse("not\nnow").await;
        let (visit, visitor) = post.visit().await.unwrap();
        let Visit::Given(given) = visit else {
            unreachable!("{visit:?}");
        };
        assert_eq!(given.handover, handover());
        assert!(visitor.accept().await);
    };
    let ask = async {
        assert_eq!(take(1, lib).await, None);
        assert_eq!(take(1, lib).await, Some(std::process::id()));
    };
    tokio::join!(serve, ask);
    drop(post);
    assert!(!pools.members().unwrap()[0].ready);
    assert_eq!(take(1, lib).await, None);
}

#[tokio::test]
async fn who_comes_second_goes_away_and_harms_nobody() {
    let (dir, pools) = pools();
    let place = pools.place(&wanted(1), Path::new("/lib")).unwrap();
    let post = Post::open(&place.dir).unwrap();
    let visitors: Vec<_> = (0..4)
        .map(|n| {
            let (member, files) = (place.dir.clone(), dir.path().join(n.to_string()));
            fs::create_dir(&files).unwrap();
            tokio::task::spawn_blocking(move || {
                let fds = fds(&files);
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                handover::give(&member, &handover(), &fds).is_ok()
            })
        })
        .collect();
    // All of them wait: the kernel lists each connection under the name that the listener
    // was made with, in the same directory.
    let name = format!(" {}/", place.dir.display());
    loop {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        if sockets.matches(&name).count() > visitors.len() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let (visit, visitor) = post.visit().await.unwrap();
    assert!(matches!(visit, Visit::Given(_)));
    drop(post);
    assert!(visitor.accept().await);
    let mut taken = 0;
    for visitor in visitors {
        taken += u32::from(visitor.await.unwrap());
    }
    // And this process, which is the member, has not been killed by the others.
    assert_eq!(taken, 1);
}

#[tokio::test]
async fn odd_visitors_are_passed_over() {
    let (_dir, pools) = pools();
    let place = pools.place(&wanted(1), Path::new("/lib")).unwrap();
    let post = Post::open(&place.dir).unwrap();
    let path = place.dir.join("sock");
    let visitors = tokio::task::spawn_blocking(move || {
        use std::io::Write;
        for text in ["", "x\n", "{}\n", "{\"retire\":", &"y".repeat(40_000)] {
            let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
            let _ = stream.write_all(text.as_bytes());
        }
        // A container without its descriptors is none.
        assert!(handover::give(path.parent().unwrap(), &handover(), &[]).is_err());
        handover::retire(path.parent().unwrap())
    });
    let (visit, visitor) = post.visit().await.unwrap();
    assert!(matches!(visit, Visit::Retire));
    assert!(visitor.accept().await);
    visitors.await.unwrap().unwrap();
    // A socket that nobody serves.
    drop(post);
    drop(UnixListener::bind(place.dir.join("sock")).unwrap());
    assert!(handover::retire(&place.dir).is_err());
}
