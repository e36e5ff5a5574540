//! Root file systems that are overlays, mounted on the host.

use super::*;

/// An overlay of `count` layers, each with a file named by its number; all have `same`, with the number in it.
fn layers(dir: &Directory, count: usize) -> Overlay {
    let lower = (0..count).map(|number| {
        dir.file(&format!("lower{number}/{number}"), "");
        dir.file(&format!("lower{number}/same"), &number.to_string());
        dir.path.join(format!("lower{number}"))
    });
    Overlay {
        lower: lower.collect(),
        upper: Some((dir.make("upper"), dir.make("work"))),
        options: vec!["index=off".into()],
        read_only: false,
    }
}

fn check_overlay(dir: &Directory, share: &Share, count: usize) {
    assert_eq!(
        fs::read_to_string(inside(share, "same")).unwrap(),
        "0",
        "the first layer is not on top"
    );
    assert!(inside(share, &(count - 1).to_string()).exists());
    fs::write(inside(share, "written"), "x").unwrap();
    assert!(dir.path.join("upper/written").exists());
    fs::remove_file(inside(share, "0")).unwrap();
    assert!(dir.path.join("lower0/0").exists());
}

#[test]
fn an_overlay_of_many_layers_is_mounted_where_nobody_sees_it() {
    needs_root!();
    let dir = Directory::new();
    let before = mounts_of_this_process();
    let overlay = layers(&dir, 60);
    let share = share_of(HostStep::Overlay {
        share: "c1.rootfs".into(),
        overlay,
    });
    assert_eq!(
        (share.name.as_str(), share.cache),
        ("c1.rootfs", CachePolicy::Exclusive)
    );
    check_overlay(&dir, &share, 60);
    assert!(!mounts_of_this_process().contains("c1.rootfs"));
    assert_eq!(
        before.matches("overlay").count(),
        mounts_of_this_process().matches("overlay").count(),
        "the overlay is seen by others"
    );
}

#[test]
fn names_of_one_file_in_a_layer_stay_one_file() {
    needs_root!();
    let dir = Directory::new();
    let overlay = layers(&dir, 1);
    fs::hard_link(dir.path.join("lower0/same"), dir.path.join("lower0/second")).unwrap();
    let step = || HostStep::Overlay {
        share: "c1.rootfs".into(),
        overlay: overlay.clone(),
    };
    let share = share_of(step());
    let number = |name| fs::metadata(inside(&share, name)).unwrap().ino();
    let before = number("same");
    fs::write(inside(&share, "second"), "changed").unwrap();
    fs::hard_link(inside(&share, "same"), inside(&share, "third")).unwrap();
    for name in ["same", "second", "third"] {
        assert_eq!(number(name), before, "{name}");
        assert_eq!(fs::read_to_string(inside(&share, name)).unwrap(), "changed");
    }
    // While it is mounted there can be no second index; the file is there all the same.
    let second = share_of(step());
    assert_eq!(fs::read_to_string(inside(&second, "second")).unwrap(), "changed");
}

#[test]
fn an_overlay_is_mounted_the_older_way_too() {
    needs_root!();
    let dir = Directory::new();
    let fd = rootfs::mount_by_path(&layers(&dir, 60)).unwrap();
    let share = Share {
        name: String::new(),
        fd,
        cache: CachePolicy::Exclusive,
        pooled: false,
        held: None,
    };
    check_overlay(&dir, &share, 60);
    assert!(
        !fs::read_to_string("/proc/mounts")
            .unwrap()
            .contains("overlay /sys")
    );
    let mut missing = layers(&dir, 2);
    missing.lower.push("/gone/layer".into());
    let error = rootfs::mount_by_path(&missing).unwrap_err();
    assert!(matches!(error, StorageError::Missing { .. }), "{error}");
}

#[test]
fn an_overlay_with_odd_paths_and_read_only_is_mounted() {
    needs_root!();
    let dir = Directory::new();
    let long = "x".repeat(200);
    dir.file(&format!("a:b,c\\d/{long}/{long}/f"), "found");
    let share = share_of(HostStep::Overlay {
        share: "c1.rootfs".into(),
        overlay: Overlay {
            lower: vec![
                dir.path.join(format!("a:b,c\\d/{long}/{long}")),
                dir.make("second"),
            ],
            read_only: true,
            ..Overlay::default()
        },
    });
    assert_eq!(fs::read_to_string(inside(&share, "f")).unwrap(), "found");
    assert_eq!(errno(fs::write(inside(&share, "f"), "x")), Some(libc::EROFS));
}

#[test]
fn an_overlay_that_the_kernel_refuses_says_why() {
    needs_root!();
    let dir = Directory::new();
    let refused = |change: fn(&mut Overlay)| {
        let mut overlay = layers(&dir, 2);
        change(&mut overlay);
        realized(HostStep::Overlay {
            share: "s".into(),
            overlay,
        })
        .unwrap_err()
        .to_string()
    };
    let unknown = refused(|overlay| overlay.options.push("nonsense=1".into()));
    assert!(
        unknown.contains("nonsense=1: Invalid argument") && unknown.contains("kernel says"),
        "{unknown}"
    );
    let gone = refused(|overlay| overlay.lower.push("/gone/layer".into()));
    assert!(gone.contains("/gone/layer does not exist"), "{gone}");
    let file = refused(|overlay| overlay.lower.push("/etc/passwd".into()));
    assert!(file.contains("/etc/passwd is not a directory"), "{file}");
}
