//! Prints a boot timeline.

use std::fmt::Write;

use sandbox::Timeline;

use crate::arguments::TimelineFormat;

/// The timeline as text or JSON, ending in a newline.
pub fn render(timeline: &Timeline, format: TimelineFormat) -> String {
    if format.is_json() {
        return serde_json::to_string(timeline).unwrap_or_default() + "\n";
    }
    let container = timeline.containers.first();
    let mut stages: Vec<(u64, &str)> = [
        (timeline.vmm_spawned, "VMM spawned"),
        (timeline.vmm_main, "VMM main"),
        (timeline.configured, "machine described"),
        (timeline.vm_created, "VM created"),
        (timeline.kernel_loaded, "kernel loaded"),
        (timeline.first_instruction, "guest's first instruction"),
        (timeline.agent_connected, "agent connected"),
        (timeline.agent_hello, "agent said Hello"),
        (timeline.ready, "guest configured"),
        (
            container.and_then(|stages| stages.storage_opened),
            "storage opened",
        ),
        (container.and_then(|stages| stages.attached), "storage attached"),
        (container.and_then(|stages| stages.created), "container created"),
        (container.and_then(|stages| stages.started), "container started"),
    ]
    .into_iter()
    .filter_map(|(time, stage)| Some((time?, stage)))
    .collect();
    stages.sort_unstable();
    let mut text = String::from("timeline (ms since start, ms since the stage before)\n");
    let mut before = 0;
    for (time, stage) in stages {
        let _ = writeln!(
            text,
            "{:>10.1} {:>+9.1}  {stage}",
            milliseconds(time),
            milliseconds(time - before)
        );
        before = time;
    }
    text
}

#[allow(
    clippy::cast_precision_loss,
    reason = "for people: a boot is far below 2^52 µs"
)]
fn milliseconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_come_in_order_and_absent_ones_are_left_out() {
        let timeline = Timeline {
            agent_hello: Some(9_000),
            vm_created: Some(2_500),
            kernel_loaded: None,
            ..Timeline::default()
        };
        let text = render(&timeline, TimelineFormat::Text);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].contains("2.5") && lines[1].ends_with("VM created"),
            "{text}"
        );
        assert!(
            lines[2].contains("+6.5") && lines[2].ends_with("agent said Hello"),
            "{text}"
        );
        assert_eq!(lines.len(), 3);
    }
}
