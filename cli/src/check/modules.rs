//! Which modules this host's kernel has: loaded, built in, or there to be loaded.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of all modules of the running kernel, with `_` for `-`.
pub struct Modules {
    known: BTreeSet<String>,
    /// Whether the kernel's own lists could be read: without them, a module that is not loaded may still be there.
    complete: bool,
}

impl Modules {
    /// Reads what depmod(8) wrote, and what is loaded.
    pub fn of_this_host() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let directory = Path::new("/lib/modules").join(release);
        let lists = ["modules.dep", "modules.builtin"].map(|list| fs::read_to_string(directory.join(list)));
        let complete = lists[0].is_ok();
        let mut known: BTreeSet<String> = lists.iter().flatten().flat_map(|text| named(text)).collect();
        if let Ok(loaded) = fs::read_dir("/sys/module") {
            known.extend(
                loaded
                    .flatten()
                    .map(|entry| entry.file_name().to_string_lossy().into_owned()),
            );
        }
        Self { known, complete }
    }

    /// Those of `wanted` that are certainly not there.
    pub fn missing<'a>(&self, wanted: &[&'a str]) -> Vec<&'a str> {
        wanted
            .iter()
            .copied()
            .filter(|name| self.complete && !self.known.contains(*name))
            .collect()
    }
}

/// The modules that the lines of `modules.dep` or `modules.builtin` are about: `kernel/net/tun.ko.xz: …` is `tun`.
fn named(list: &str) -> impl Iterator<Item = String> {
    list.lines().filter_map(|line| {
        let file = line.split(':').next()?.rsplit('/').next()?;
        let (name, _) = file.split_once(".ko")?;
        Some(name.replace('-', "_"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_known_by_their_files() {
        let list = "kernel/drivers/net/tun.ko.xz: kernel/x/y.ko\nkernel/fs/erofs/erofs.ko:\nkernel/net/nf-tables.ko\nnonsense\n\n";
        assert_eq!(named(list).collect::<Vec<_>>(), ["tun", "erofs", "nf_tables"]);
    }

    #[test]
    fn only_a_complete_list_can_tell_that_a_module_is_missing() {
        let mut modules = Modules {
            known: ["tun".to_owned()].into(),
            complete: true,
        };
        assert_eq!(modules.missing(&["tun", "erofs"]), ["erofs"]);
        modules.complete = false;
        assert!(modules.missing(&["tun", "erofs"]).is_empty());
    }
}
