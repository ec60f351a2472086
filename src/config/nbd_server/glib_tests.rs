//! The real GLib beside ours: the same texts, the same groups and values, or the same refusal.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::key_file::KeyFile;

/// Reads a JSON array of texts and prints for each `null` (refused) or its groups with every key's four readings.
const GLIB: &str = r#"
import json, sys
from gi.repository import GLib
def read(text):
    k = GLib.KeyFile()
    try:
        k.load_from_data(text, len(text.encode()), GLib.KeyFileFlags.KEEP_COMMENTS | GLib.KeyFileFlags.KEEP_TRANSLATIONS)
    except GLib.Error:
        return None
    def value(get, group, key):
        try: return getattr(k, get)(group, key)
        except GLib.Error: return None
    gets = ["get_boolean", "get_integer", "get_int64", "get_string"]
    return [[g, {key: [value(get, g, key) for get in gets] for key in k.get_keys(g)[0]}] for g in k.get_groups()[0]]
json.dump([read(text) for text in json.load(sys.stdin)], sys.stdout)
"#;

fn ours(text: &str) -> Value {
    let Ok(parsed) = KeyFile::parse(Path::new("x"), text) else {
        return Value::Null;
    };
    let groups = parsed.groups.iter().map(|group| {
        let keys: serde_json::Map<String, Value> = group
            .entries
            .iter()
            .map(|(key, entry)| {
                let readings = json!([
                    entry.boolean().ok(),
                    entry.integer().ok(),
                    entry.int64().ok(),
                    entry.string().ok()
                ]);
                ((*key).to_owned(), readings)
            })
            .collect();
        json!([group.name, keys])
    });
    groups.collect()
}

/// What was measured by hand first, then what a seeded generator makes of the same pieces.
fn texts() -> Vec<String> {
    let files = [
        "",
        "\n",
        "#c\n",
        "a=b\n",
        "[generic]",
        "  [generic]  \na=1",
        "[generic] # x\n",
        "[gen\n",
        "[g]x\n",
        "[]\n",
        "[a[b]\n",
        "[a]b]\n",
        "[g]\n=v\n",
        "[g]\nk\n",
        "[g]\nk =  v  \n",
        "[g]\nk=a=b\n",
        "[g]\n;x=1\n",
        "[g]\nk[de]=v\n",
        "[g]\nk[de=v\n",
        "[g]\nk x=v\n",
        "[g]\r\nk=v\r\n",
        "[g]\nk=v\r",
        "[g]\nEncoding=latin1\n",
        "[g]\nEncoding=utf-8\n",
        "[a]\nx=1\n[b]\ny=1\n[a]\nx=2\nz=3\n",
        "[ g ]\nk=1\n",
        "[g]\n\u{b}k=v\n",
        "[g]\nk\u{1}=v\n",
        "[g\u{1}]\nk=v\n",
        "[g]\nké=v\n",
        "[é]\nk=v\n",
        "\u{feff}[g]\nk=v\n",
        "[g]\n   \nk=v",
        "[g]\n k [de] = v\n",
        "[g]\nk[d e]=v\n",
        "[g]\nk]=v\n",
        "[g]\nk=\n",
        "[a]\n[g]\nEncoding=latin1\n",
        "[g]\u{b}\nk=v",
        "[g]\nk\t =\t v\t\n",
        "[g]\n\u{c}[h]\nk=v\n",
    ];
    let values = [
        "",
        "true",
        "false",
        "1",
        "0",
        "yes",
        "TRUE",
        "true  ",
        "true\t",
        " true",
        "1 2",
        "12 ",
        "12 abc",
        "12abc",
        "0x10",
        "-1",
        "+5",
        "2147483647",
        "2147483648",
        "-2147483649",
        "9223372036854775808",
        "-9223372036854775809",
        "1.5",
        "\\s a",
        "a\\sb",
        "a\\x",
        "a\\",
        "a;b",
        "a\\;b",
        "a\\\\b",
        "\\s",
        "a\\tb\\r\\n",
        "10\\s",
        " +12",
        "--1",
        "+",
    ];
    let mut texts: Vec<String> = files.iter().map(|text| (*text).to_owned()).collect();
    texts.extend(values.iter().map(|value| format!("[g]\nk={value}\n")));
    let pieces = [
        "[g]\n",
        "[generic]\n",
        "[",
        "]",
        "=",
        "k",
        "k=",
        "\n",
        "\r\n",
        "\r",
        "\\",
        "\\s",
        "#",
        " ",
        "\t",
        "é",
        "[de]",
        "true",
        "12",
        "-",
        "+",
        ";",
        "\u{c}",
        "Encoding=utf-8",
        "[h]\n",
    ];
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..3_000 {
        let mut text = String::from("[g]\n");
        for _ in 0..10 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let at = usize::try_from(seed >> 8).unwrap_or(0) % pieces.len();
            text.push_str(pieces[at]);
        }
        texts.push(text);
    }
    texts
}

#[test]
fn every_text_reads_as_glib_reads_it() {
    let python = "/usr/bin/python3";
    let there = Command::new(python)
        .args(["-c", "from gi.repository import GLib"])
        .stderr(Stdio::null())
        .status();
    if !there.is_ok_and(|status| status.success()) {
        println!("SKIPPED: every_text_reads_as_glib_reads_it: python3-gi is not installed");
        return;
    }
    let texts = texts();
    let mut child = Command::new(python)
        .args(["-c", GLIB])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 runs");
    let input = json!(texts).to_string();
    let mut pipe = child.stdin.take().expect("piped");
    let writer = std::thread::spawn(move || pipe.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("python3 ends");
    writer.join().expect("written").expect("read by python3");
    let glib: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(glib.len(), texts.len());
    let read = glib.iter().filter(|value| !value.is_null()).count();
    assert!(
        read > 300,
        "only {read} texts were readable: the comparison says little"
    );
    for (text, glib) in texts.iter().zip(glib) {
        assert_eq!(ours(text), glib, "{text:?}");
    }
}
