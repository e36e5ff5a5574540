//! Plans of the volumes of a pod: empty directories, files of the API, devices, huge pages.

use super::*;

#[test]
fn an_empty_dir_in_memory_is_the_guests_and_its_sub_paths_too() {
    let bind = |source: &str| {
        let json =
            format!(r#"{{"destination":"/x","source":"/k/pods/1/{source}","options":["rbind","ro"]}}"#);
        let spec = spec(&format!(r#","root":{{"path":"rootfs"}},"mounts":[{json}]"#));
        let mut plan = Plan::new(context(), &spec, &[], &host).unwrap();
        (plan.mounts.remove(0).source, plan.volumes, plan.host.len() - 1)
    };
    let owner = Owner {
        uid: 0,
        gid: 7,
        mode: 0o2777,
    };
    let volume = |path: &str, directory| MountSource::Volume {
        name: "memory-8-2d".into(),
        path: path.into(),
        directory,
    };
    let made = vec![MemoryVolume {
        name: "memory-8-2d".into(),
        bytes: 64 << 20,
        huge_page_bytes: 0,
        root: owner,
    }];
    assert_eq!(
        bind("volumes/kubernetes.io~empty-dir/mem"),
        (volume("", None), made.clone(), 0)
    );
    assert_eq!(
        bind("volume-subpaths/mem/c/0"),
        (volume("sub/dir", Some(owner)), made, 0)
    );
    // Without a mount of its own it is on kubelet's file system, of whatever kind that is.
    let (source, volumes, shares) = bind("volumes/kubernetes.io~empty-dir/disk");
    assert!(matches!(source, MountSource::Share { .. }), "{source:?}");
    assert_eq!((volumes, shares), (vec![], 1));
    let MountSource::Share { name: whole, .. } = source else {
        panic!("{source:?}");
    };
    // A part of it is the same share.
    assert_eq!(bind("volume-subpaths/disk/c/0").0, share(&whole, "a/b"));
}

#[test]
fn an_empty_dir_is_one_share_for_all_and_api_files_are_a_volume() {
    let bind = |source: &str, options: &str| {
        let json = format!(r#"{{"destination":"/x","source":"/k/pods/1/{source}","options":[{options}]}}"#);
        let (mut steps, mut mounts) = mounts(&json).unwrap();
        (steps.remove(0), mounts.remove(0))
    };
    let disk = "volumes/kubernetes.io~empty-dir/disk";
    let (write, _) = bind(disk, r#""rbind""#);
    let (read, mount) = bind(disk, r#""rbind","ro""#);
    assert_eq!(write, read);
    assert_eq!(mount.options, words("rbind ro"));
    let (step, mount) = bind("volumes/kubernetes.io~secret/s", r#""rbind","ro""#);
    assert!(matches!(step, HostStep::Volume { .. }), "{step:?}");
    assert!(matches!(mount.source, MountSource::Volume { .. }), "{mount:?}");
    // A copy would not carry writes to the host.
    let (step, _) = bind("volumes/kubernetes.io~secret/s", r#""rbind""#);
    assert!(matches!(step, HostStep::Directory { .. }), "{step:?}");
}

#[test]
fn one_directory_at_two_places_is_one_share() {
    let (steps, mounts) = mounts(
        r#"{"destination":"/a","source":"/data","options":["rbind"]},
           {"destination":"/b","source":"/data","options":["rbind"]},
           {"destination":"/c","source":"/data","options":["rbind","ro"]}"#,
    )
    .unwrap();
    assert_eq!(steps.len(), 2);
    assert_eq!(mounts[0].source, mounts[1].source);
    assert_ne!(mounts[0].source, mounts[2].source);
}

#[test]
fn a_block_device_at_a_path_is_its_node() {
    let json = r#"{"destination":"/dev/disk","type":"bind","source":"/dev/sda","options":["rbind","rprivate"]},
                  {"destination":"/dev/again","type":"bind","source":"/dev/sda","options":["bind"]}"#;
    let (steps, mounts) = mounts(json).unwrap();
    // No rule allows writing to it.
    assert_eq!(
        steps,
        [HostStep::Device {
            number: (8, 0),
            read_only: true
        }]
    );
    let node = || MountSource::Block {
        disk: 0,
        part: 0,
        file_system: String::new(),
        devices: Vec::new(),
    };
    assert_eq!(
        mounts,
        [
            guest(node(), "/dev/disk", "rbind rprivate"),
            guest(node(), "/dev/again", "bind")
        ]
    );
}

#[test]
fn a_directory_of_huge_pages_is_the_guests_and_the_pods() {
    let source = "/k/pods/1/volumes/kubernetes.io~empty-dir/huge";
    let json = format!(r#"{{"destination":"/huge","type":"bind","source":"{source}","options":["rbind"]}}"#);
    let spec = spec(&format!(r#","root":{{"path":"rootfs"}},"mounts":[{json}]"#));
    let plan = Plan::new(context(), &spec, &[], &host).unwrap();
    let [volume] = &plan.volumes[..] else {
        panic!("{plan:?}");
    };
    assert_eq!((volume.huge_page_bytes, volume.bytes), (2 << 20, 0));
    assert!(matches!(&plan.mounts[0].source, MountSource::Volume { name, .. } if *name == volume.name));
    assert_eq!(plan.agent_volumes()[0].empty().huge_page_bytes, 2 << 20);
    assert_eq!(plan.host.len(), 1, "nothing is shared but the root");
}
