//! The dashboard's and the alert rules' queries on the real endpoint in a real Prometheus.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use support::client::Client;
use support::ground::{Need, real};
use support::process::{self, Running};
use support::scene::Scene;
use support::{Outcome, hold, until};

const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Bus,
    Need::Tool("prometheus"),
    Need::Tool("promtool"),
];
const LIMIT: Duration = Duration::from_secs(60);

fn shipped(path: &str) -> String {
    format!("{}/packaging/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// One instant query; its result, or what Prometheus says is wrong with it.
fn query(address: &str, expression: &str) -> Outcome<Vec<Value>> {
    let mut escaped = String::new();
    for byte in expression.bytes() {
        escaped.push_str(&format!("%{byte:02X}"));
    }
    let mut stream = std::net::TcpStream::connect(address)?;
    write!(
        stream,
        "GET /api/v1/query?query={escaped} HTTP/1.0\r\nHost: x\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let value: Value = serde_json::from_str(body)?;
    hold!(value["status"] == "success", "{expression}: {value}");
    Ok(value["data"]["result"]
        .as_array()
        .cloned()
        .unwrap_or_default())
}

#[test]
fn every_alert_fires_on_what_it_is_for() -> Outcome<()> {
    real("alert rules", &[Need::Tool("promtool")], |_| {
        let rules = shipped("prometheus/nbdtrack.rules.yml");
        process::succeed("promtool", &["check", "rules", &rules], LIMIT)?;
        let tests = shipped("prometheus/tests.yml");
        process::succeed("promtool", &["test", "rules", &tests], LIMIT)?;
        Ok(())
    })
}

#[test]
fn every_query_of_the_dashboard_and_of_the_rules_is_answered_by_a_real_prometheus() -> Outcome<()> {
    real("dashboard", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], 4 << 20)?;
        let exporter = format!("127.0.0.1:{}", support::daemon::free_port()?);
        let mut command = process::command(support::daemon::binary());
        command
            .args([
                "--bus",
                &scene.bus.address,
                "metrics",
                "--listen",
                &exporter,
            ])
            .stdout(Stdio::null());
        let _exporter = Running(command.spawn()?);
        let address = format!("127.0.0.1:{}", support::daemon::free_port()?);
        let config = ground.file("prometheus.yml");
        std::fs::write(
            &config,
            format!(
                "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{}]\nscrape_configs:\n  - job_name: \
                 nbdtrack\n    static_configs: [{{targets: ['{exporter}']}}]\n",
                shipped("prometheus/nbdtrack.rules.yml")
            ),
        )?;
        let mut command = process::command("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                ground.file("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(ground.file("prometheus.log"))?);
        let _prometheus = Running(command.spawn()?);
        // Traffic, so that rates have something to tell, for as long as Prometheus takes to see it.
        let mut client = Client::open(&scene.endpoint(), "vol-a")?;
        until(LIMIT, "Prometheus to have seen traffic", || {
            let read = client.read(0, &mut [0; 4096])?;
            let written = client.write(0, &[1; 4096], false)?;
            hold!(read.is_ok() && written.is_ok(), "{read:?} {written:?}");
            let rate = "sum(rate(nbdtrack_export_requests_total{export=\"vol-a\"}[30s])) > 0";
            let Ok(found) = query(&address, rate) else {
                return Ok(None);
            };
            Ok((!found.is_empty()).then_some(()))
        })?;
        let dashboard: Value =
            serde_json::from_str(&std::fs::read_to_string(shipped("grafana/nbdtrack.json"))?)?;
        let mut asked = 0;
        for panel in dashboard["panels"].as_array().into_iter().flatten() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let expression = target["expr"].as_str().unwrap_or_default();
                let expression = expression.replace("$__rate_interval", "30s");
                let found = query(&address, &expression)?;
                hold!(
                    !found.is_empty(),
                    "{}: {expression}: nothing",
                    panel["title"]
                );
                asked += 1;
            }
        }
        hold!(asked >= 10, "{asked} queries");
        let firing = query(&address, "ALERTS{alertstate=\"firing\"}")?;
        hold!(firing.is_empty(), "all is well, yet: {firing:?}");
        // Each metric that a rule names is one that there is.
        let rules = std::fs::read_to_string(shipped("prometheus/nbdtrack.rules.yml"))?;
        let words = rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for metric in words.filter(|word| word.starts_with("nbdtrack_")) {
            hold!(
                !query(&address, metric)?.is_empty(),
                "{metric}: there is no such metric"
            );
        }
        client.leave()?;
        scene.stop()
    })
}
