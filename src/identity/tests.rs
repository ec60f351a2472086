//! What `identity` promises, by example.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

mod examples;

use examples::*;

#[test]
fn disks_of_every_platform_are_their_volumes() {
    for example in examples() {
        let volume = volume(example.volume);
        let shared: Vec<Identity> = identities(&example.disk)
            .intersection(&volume.candidates())
            .cloned()
            .collect();
        assert!(
            !shared.is_empty(),
            "{}: {:?}",
            example.volume,
            identities(&example.disk)
        );
    }
}

#[test]
fn no_example_is_the_volume_of_another_disk() {
    let examples = examples();
    for (at, example) in examples.iter().enumerate() {
        for (other_at, other) in examples.iter().enumerate() {
            let same = at == other_at || example.disk == other.disk;
            let shared = identities(&example.disk)
                .intersection(&volume(other.volume).candidates())
                .count();
            assert!(
                same || shared == 0,
                "{} and {}",
                example.volume,
                other.volume
            );
        }
    }
}

#[test]
fn ids_have_one_spelling() {
    let table = [
        (
            "cloudstack:5F0C2A1E7B1D4C559C390D2A6D0F8A11",
            "cloudstack:5f0c2a1e-7b1d-4c55-9c39-0d2a6d0f8a11",
        ),
        ("ebs:vol0fab1d5e3f72a5e23", "ebs:vol-0fab1d5e3f72a5e23"),
        ("ebs:vol-1234abcd", "ebs:vol-1234abcd"),
        (
            "vmware:6000C293 1d 2e 4f 5a-8b 6c 7d 8e 9f a0 b1 c2",
            "vmware:6000c293-1d2e-4f5a-8b6c-7d8e9fa0b1c2",
        ),
        ("wwn:0x5000C500A1B2C3D4", "wwn:naa.5000c500a1b2c3d4"),
        (
            "wwn:36001405d27e5d8988294b1f9c0a7e3d2",
            "wwn:naa.6001405d27e5d8988294b1f9c0a7e3d2",
        ),
        ("wwn:EUI.0025385B71B00F2A", "wwn:eui.0025385b71b00f2a"),
        ("azure:lun=4", "azure:lun=4"),
        (
            "serial: leading blank counts",
            "serial: leading blank counts",
        ),
        ("loop:/srv/a b.img", "loop:/srv/a b.img"),
    ];
    for (written, normal) in table {
        assert_eq!(volume(written).to_string(), normal);
    }
}

#[test]
fn what_is_no_id_is_refused_with_an_example() {
    let table = [
        "cloudstack:",
        "cloudstack:5f0c2a1e-7b1d-4c55-9c39-0d2a6d0f8a1",
        "cloudstack:5f0c2a1e7b1d-4c55-9c39-0d2a6d0f8a11",
        "openstack:65953b61-0af1-42f6-a",
        "ebs:vol-0FAB1D5E3F72A5E23",
        "ebs:0fab1d5e3f72a5e23",
        "gcp:My-Disk",
        "gcp:1disk",
        "azure:lun=64",
        "azure:lun=04",
        "azure:a/b",
        "vmware:7000c293-1d2e-4f5a-8b6c-7d8e9fa0b1c2",
        "serial:ends with a blank ",
        "serial:tab\tinside",
        "wwn:6001405d27e5d8988294b1f9c0a7e3d2x",
        "wwn:naa.6001405",
        "loop:relative.img",
        "loop:/srv//a.img",
        "loop:/srv/../a.img",
        "loop:/srv/a.img/",
        "loop:/srv/a.img (deleted)",
        "loop:/srv/a\n.img",
        "gpt:x",
        "slot:",
    ];
    for text in table {
        match VolumeId::parse(text) {
            Err(error @ VolumeIdError::Malformed { .. }) => {
                assert!(error.to_string().contains("for example"), "{error}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    assert!(matches!(
        VolumeId::parse("/dev/vdb"),
        Err(VolumeIdError::NoProfile(_))
    ));
    assert!(matches!(
        VolumeId::parse("path:/dev/vdb"),
        Err(VolumeIdError::UnknownProfile(_))
    ));
    assert!(matches!(
        VolumeId::parse(&"x".repeat(1 << 20)),
        Err(VolumeIdError::TooLong(_))
    ));
}

/// A number of this boot says nothing in the next one, and what a path means is decided once: neither can be written.
#[test]
fn what_is_made_inside_cannot_be_written_outside() {
    for made in [
        VolumeId::of_attachment("8cb1c1b4-0a2f-4b1e-9d55-0c7b8f4c3a11", 7),
        VolumeId::of_path("/dev/vdc"),
    ] {
        let text = made.to_string();
        assert!(VolumeId::parse(&text).is_err(), "{text}");
        assert!(!made.candidates().is_empty());
        for candidate in made.candidates() {
            assert!(VolumeId::of_identity(&candidate).is_err(), "{candidate}");
            let text = format!("disk:{candidate}");
            assert!(VolumeId::parse(&text).is_err(), "{text}");
        }
    }
    assert_eq!(VolumeId::of_path("/dev/vdc").path(), Some("/dev/vdc"));
    assert_eq!(VolumeId::of_attachment("b", 7).path(), None);
}

#[test]
fn a_disk_is_named_by_one_thing_that_it_says_of_itself() {
    for text in [
        "virtio-serial:Ab Cd",
        "loop:/srv/a.img",
        "scsi-naa:6001405d27e5d8988294b1f9c0a7e3d2",
    ] {
        let identity = Identity::parse(text).unwrap();
        assert_eq!(identity.to_string(), text);
        let volume = VolumeId::of_identity(&identity).unwrap();
        assert_eq!(volume.candidates(), [identity].into());
        assert_eq!(VolumeId::parse(&volume.to_string()), Ok(volume));
    }
    for text in [
        "slot:pci-0000:00:07.0",
        "gpt:93623f30-edc3-42fe-9def-a2aef1725f9d",
        "file:/srv/a.raw",
        "qcow2:/srv/a.qcow2",
        "virtio-serial:0000",
        "virtio-serial:",
        "serial:x",
    ] {
        assert!(VolumeId::parse(&format!("disk:{text}")).is_err(), "{text}");
    }
}

#[test]
fn every_profile_takes_its_own_example() {
    for name in super::profile::profile_names() {
        let Err(VolumeIdError::Malformed { example, .. }) =
            VolumeId::parse(&format!("{name}:\u{7f}"))
        else {
            panic!("{name} takes anything");
        };
        assert_eq!(volume(example).profile(), name);
    }
}

#[test]
fn worthless_serials_identify_nothing() {
    let table = [
        "",
        " ",
        "0",
        "0000000000000000",
        "00000000-0000-0000-0000-000000000000",
        "\0\0\0",
        "QM00001",
        "drive-scsi1",
        "libvirt-3-format",
        "nvme_card-pd",
        "None",
        "none",
        "ffffffff",
        "0123456789ABCDEF",
        "tab\there",
        "caf\u{e9}",
        "lost\u{fffd}byte",
    ];
    for serial in table {
        let disk = Attributes {
            virtio_serial: Some(serial.to_owned()),
            nvme_serial: Some(serial.to_owned()),
            nvme_nsid: Some(1),
            vpd_pg80: Some(page80(serial.as_bytes())),
            vpd_pg83: Some(page83(&[(0x02, 0x00, serial.as_bytes())])),
            ..Attributes::default()
        };
        assert_eq!(identities(&disk), BTreeSet::new(), "{serial:?}");
        assert!(
            VolumeId::parse(&format!("serial:{serial}")).is_err(),
            "{serial:?}"
        );
    }
    assert!(VolumeId::parse("gpt:00000000-0000-0000-0000-000000000000").is_err());
    assert!(VolumeId::parse("wwn:naa.0000000000000000").is_err());
    assert!(VolumeId::parse("cloudstack:00000000-0000-0000-0000-000000000000").is_err());
}

/// A target gave the address of a disk to another volume. The kernel's pages were the first volume's, and so was what the disk was taken for.
#[test]
fn a_scsi_disk_is_what_it_says_itself_and_not_what_the_kernel_remembers() {
    let naa = |last: u8| [0x60, 1, 0x40, 5, 1, 2, 3, last];
    let pages = |serial: &str, last: u8| ScsiPages {
        vpd_pg80: Some(page80(serial.as_bytes())),
        vpd_pg83: Some(page83(&[(1, 3, &naa(last))])),
    };
    let disk = |said: ScsiPages, remembered: Option<ScsiPages>| Attributes {
        vpd_pg80: said.vpd_pg80,
        vpd_pg83: said.vpd_pg83,
        scsi_remembered: remembered,
        wwid: Some("naa.6001400501020304".to_owned()),
        ..Attributes::default()
    };
    let first = disk(pages("first", 4), Some(pages("first", 4)));
    let second = disk(pages("second", 5), Some(pages("second", 5)));
    assert_eq!(
        identities(&first),
        identities(&disk(pages("first", 4), None))
    );
    assert_eq!(identities(&first).len(), 2);
    assert_eq!(disputed(&first), None);

    let exchanged = disk(pages("second", 5), Some(pages("first", 4)));
    assert_eq!(identities(&exchanged), identities(&second));
    let both = [identities(&second), identities(&first)];
    assert_eq!(disputed(&exchanged), Some(both));

    // The disk has page 0x83 no more: the kernel's `wwid`, which is made of the old one, says nothing.
    let silent = ScsiPages {
        vpd_pg83: None,
        ..pages("first", 4)
    };
    let half = identities(&disk(silent, Some(pages("first", 4))));
    assert_eq!(half, [Identity::new(Scheme::ScsiPg80, "first")].into());
}

#[test]
fn a_cut_that_leaves_only_zeroes_is_no_candidate() {
    let serial = volume("serial:0000000000000000000000000000007");
    let cut: Vec<_> = serial
        .candidates()
        .into_iter()
        .filter(|c| c.scheme == Scheme::VirtioSerial)
        .collect();
    assert_eq!(cut, []);
}

#[test]
fn only_trailing_padding_of_a_serial_goes() {
    let disk = Attributes {
        virtio_serial: Some(" Ab Cd \0 \n".to_owned()),
        ..Attributes::default()
    };
    assert_eq!(
        identities(&disk),
        [Identity::new(Scheme::VirtioSerial, " Ab Cd")].into()
    );
}

#[test]
fn an_nvme_serial_without_a_namespace_is_no_identity() {
    for nsid in [None, Some(0), Some(u32::MAX)] {
        let disk = Attributes {
            nvme_serial: Some("vol0fab1d5e3f72a5e23".to_owned()),
            nvme_nsid: nsid,
            ..Attributes::default()
        };
        assert_eq!(identities(&disk), BTreeSet::new());
    }
}

#[test]
fn the_name_of_an_azure_local_disk_is_its_place_and_no_volume() {
    let example = nvme(
        "serial:ebeb91bd841bceb90001",
        "Microsoft NVMe Direct Disk v2",
        "ebeb91bd841bceb90001",
        1,
        b"type=local,index=1,name=nvme-440G-1\0",
    );
    assert_eq!(
        identities(&example.disk),
        [Identity::new(Scheme::NvmeSerial, "ebeb91bd841bceb90001_1")].into()
    );
    assert!(
        volume(example.volume)
            .candidates()
            .contains(&Identity::new(Scheme::NvmeSerial, "ebeb91bd841bceb90001_1"))
    );
}

#[test]
fn a_deleted_backing_file_identifies_nothing() {
    for path in ["/srv/a.img (deleted)", "relative", "/srv/lost\u{fffd}byte"] {
        let disk = Attributes {
            backing_file: Some(path.to_owned()),
            ..Attributes::default()
        };
        assert_eq!(identities(&disk), BTreeSet::new(), "{path}");
    }
}

#[test]
fn pages_that_lie_about_a_length_say_nothing() {
    let good = page83(&[
        (0x01, 0x03, &[0x60, 1, 0x40, 5, 1, 2, 3, 4]),
        (0x02, 0x00, b"text-1"),
    ]);
    let read = |page: &[u8]| {
        identities(&Attributes {
            vpd_pg83: Some(page.to_vec()),
            ..Attributes::default()
        })
    };
    assert_eq!(read(&good).len(), 2);
    for end in 0..good.len() {
        assert_eq!(read(&good[..end]), BTreeSet::new(), "cut at {end}");
    }
    let mut longer = good.clone();
    longer[7] = 200;
    assert_eq!(read(&longer), BTreeSet::new());
    // Two bytes after the last designator, counted by the page: the begin of one that was cut.
    let mut stray = good.clone();
    stray.extend([0x01, 0x03]);
    stray[3] += 2;
    assert_eq!(read(&stray), BTreeSet::new());
    let mut other_page = good.clone();
    other_page[1] = 0x80;
    assert_eq!(read(&other_page), BTreeSet::new());
    let mut padded = good.clone();
    padded.extend([0xff; 50]);
    assert_eq!(read(&padded), read(&good));
}

#[test]
fn designators_of_a_target_port_are_not_the_disks() {
    let disk = Attributes {
        vpd_pg83: Some(page83(&[(0x61, 0x93, &[0x50, 1, 2, 3, 4, 5, 6, 7])])),
        ..Attributes::default()
    };
    assert_eq!(identities(&disk), BTreeSet::new());
}

#[test]
fn a_disk_is_named_by_precedence_and_never_by_a_slot() {
    let mut set: BTreeSet<Identity> = Scheme::ALL.iter().map(|s| Identity::new(*s, "x")).collect();
    let mut order = Vec::new();
    while let Some(first) = primary(&set).cloned() {
        order.push(first.scheme.name());
        set.remove(&first);
    }
    assert_eq!(
        order,
        [
            "nvme-nguid",
            "scsi-naa",
            "nvme-serial",
            "scsi-pg80",
            "virtio-serial",
            "loop",
            "file",
            "qcow2",
            "nvme-eui",
            "nvme-uuid",
            "scsi-eui",
            "gce-name",
            "azure-name",
            "scsi-vendor",
            "scsi-t10",
        ]
    );
}

#[test]
fn weak_ids_need_to_be_allowed() {
    let opt_in = |text| volume(text).opt_in();
    assert_eq!(
        opt_in("gpt:93623f30-edc3-42fe-9def-a2aef1725f9d"),
        Some(OptIn::Gpt)
    );
    assert_eq!(opt_in("slot:pci-0000:00:07.0"), Some(OptIn::Slot));
    assert_eq!(opt_in("azure:lun=4"), Some(OptIn::Slot));
    assert_eq!(opt_in("azure:data-db"), None);
    assert_eq!(
        opt_in("cloudstack:5f0c2a1e-7b1d-4c55-9c39-0d2a6d0f8a11"),
        None
    );
}

#[test]
fn volumes_that_a_cut_makes_alike_collide_and_both_are_named() {
    let a = volume("cloudstack:5f0c2a1e-7b1d-4c55-9c39-0d2a6d0f8a11");
    let b = volume("cloudstack:5f0c2a1e-7b1d-4c55-9c39-ffffffffffff");
    let other = volume("cloudstack:6f0c2a1e-7b1d-4c55-9c39-0d2a6d0f8a11");
    let found = collisions([("one", &a), ("again", &a), ("two", &b), ("three", &other)]);
    assert_eq!(found.len(), 1);
    let told = found[0].to_string();
    for part in ["\"one\"", "\"two\"", "5f0c2a1e7b1d4c559c39"] {
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn two_spellings_of_one_disk_in_two_profiles_collide() {
    let a = volume("vmware:6000c293-1d2e-4f5a-8b6c-7d8e9fa0b1c2");
    let b = volume("wwn:naa.6000c2931d2e4f5a8b6c7d8e9fa0b1c2");
    assert_eq!(collisions([("a", &a), ("b", &b)]).len(), 1);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(disk in any_attributes()) {
        for identity in identities(&disk) {
            prop_assert!(!identity.value.is_empty());
        }
    }

    #[test]
    fn pages_with_any_header_are_read_without_a_panic(len in any::<u16>(), body in prop::collection::vec(any::<u8>(), 0..400)) {
        for code in [0x80, 0x83] {
            let mut page = vec![0, code];
            page.extend(len.to_be_bytes());
            page.extend(&body);
            let disk = Attributes { vpd_pg80: Some(page.clone()), vpd_pg83: Some(page), ..Attributes::default() };
            identities(&disk);
        }
    }

    #[test]
    fn what_is_displayed_parses_to_the_same(text in any_id()) {
        if let Ok(volume) = VolumeId::parse(&text) {
            prop_assert_eq!(VolumeId::parse(&volume.to_string()), Ok(volume));
        }
    }

    #[test]
    fn candidates_are_few_and_never_none(text in any_id()) {
        if let Ok(volume) = VolumeId::parse(&text) {
            prop_assert!((1..=8).contains(&volume.candidates().len()));
        }
    }

    #[test]
    fn ids_that_share_a_candidate_are_told(ids in prop::collection::vec(close_id(), 2..6)) {
        let volumes: Vec<VolumeId> = ids.iter().filter_map(|id| VolumeId::parse(id).ok()).collect();
        let told = collisions(volumes.iter().enumerate());
        for (at, a) in volumes.iter().enumerate() {
            for b in volumes.iter().skip(at + 1) {
                let alike = a != b && !a.candidates().is_disjoint(&b.candidates());
                // Told against whoever came first with a candidate; a repetition of a volume is not told again.
                let told = |volume: &VolumeId| told.iter().any(|c| c.second_volume == *volume);
                prop_assert!(!alike || told(a) || told(b), "{a} {b}");
            }
        }
        for c in told {
            prop_assert!(c.first_volume != c.second_volume);
            prop_assert!(c.first_volume.candidates().contains(&c.shared));
            prop_assert!(c.second_volume.candidates().contains(&c.shared));
        }
    }
}

fn volume(text: &str) -> VolumeId {
    VolumeId::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

fn any_attributes() -> impl Strategy<Value = Attributes> {
    let text = || prop::option::of(prop_oneof![any::<String>(), "[0-9a-f. -]{0,40}"]);
    let bytes = || prop::option::of(prop::collection::vec(any::<u8>(), 0..300));
    let texts = (
        text(),
        text(),
        text(),
        text(),
        text(),
        text(),
        text(),
        text(),
        text(),
        text(),
    );
    (texts, bytes(), bytes(), bytes(), any::<Option<u32>>()).prop_map(
        |(t, pg80, pg83, vendor_bytes, nsid)| Attributes {
            virtio_serial: t.0,
            wwid: t.1,
            vendor: t.2,
            model: t.3,
            nvme_serial: t.4,
            nvme_nguid: t.5,
            nvme_eui: t.6,
            backing_file: t.7,
            gpt_disk_guid: t.8,
            id_path: t.9,
            removable: false,
            vpd_pg80: pg80,
            vpd_pg83: pg83,
            scsi_remembered: None,
            nvme_vendor_bytes: vendor_bytes,
            nvme_nsid: nsid,
            nvme_uuid: None,
            unread: BTreeMap::new(),
        },
    )
}

/// Ids of every profile, mostly well-formed.
fn any_id() -> impl Strategy<Value = String> {
    let uuid = "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}";
    prop_oneof![
        ("(cloudstack|openstack|gpt)", uuid).prop_map(|(p, id)| format!("{p}:{id}")),
        "ebs:vol-?([0-9a-f]{8}|[0-9a-f]{17})",
        "gcp:[a-z][a-z0-9_-]{0,70}",
        "azure:(lun=[0-9]{1,2}|[a-zA-Z0-9][a-zA-Z0-9._-]{0,90})",
        "vmware:6000[cC]29[0-9a-fA-F]{25}",
        "(serial|slot):[ -~]{0,60}",
        "wwn:(naa[.]|eui[.]|uuid[.]|0x|3|2)([0-9a-f]{16}|[0-9a-f]{24}|[0-9A-F]{32})",
        "loop:(/[a-z. ]{1,4}){1,5}",
        ".{0,30}",
    ]
}

/// Ids of few profiles that differ in few places, so that cuts make many of them alike.
fn close_id() -> impl Strategy<Value = String> {
    prop_oneof![
        "(cloudstack|openstack):5f0c2a1e-7b1d-4c5[56]-9c39-0d2a6d0f8a1[0-2]",
        "serial:[ab]{1,2}(_[12]){0,2}",
        "serial:aaaaaaaaaaaaaaaaaaaa[ab]{0,2}",
        "serial:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa[ab]{0,2}",
        "(vmware:|wwn:naa.|wwn:eui.)6000c2931d2e4f5a8b6c7d8e9fa0b1c[12]",
        "ebs:vol-0fab1d5e3f72a5e2[12]",
        "serial:vol0fab1d5e3f72a5e2[12]",
    ]
}

fn page80(serial: &[u8]) -> Vec<u8> {
    let len = u16::try_from(serial.len()).expect("test serials are short");
    [&[0, 0x80][..], &len.to_be_bytes(), serial].concat()
}

/// A page of (code set, association and type, value).
fn page83(designators: &[(u8, u8, &[u8])]) -> Vec<u8> {
    let body: Vec<u8> = designators
        .iter()
        .flat_map(|(set, kind, value)| {
            let len = u8::try_from(value.len()).expect("test values are short");
            [&[*set, *kind, 0, len][..], value].concat()
        })
        .collect();
    let len = u16::try_from(body.len()).expect("test pages are short");
    [&[0, 0x83][..], &len.to_be_bytes(), &body].concat()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("test hex"))
        .collect()
}
