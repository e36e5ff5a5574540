//! What an administrator installs: the installer beside each kind of containerd, the Debian package, and the image
//! that the DaemonSet runs.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use kata_rs_tests::{Aside, BUSYBOX, IMAGES, sh, sh_with_input, unique};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Runs a command of this machine and returns its standard output.
fn here(command: &mut Command) -> Vec<u8> {
    let output = command.output().expect("the command starts");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// A directory where the containers run, with `deploy/` in it; removed at the end.
struct Place(String);

impl Place {
    fn new() -> Self {
        let place = Self(format!("/tmp/{}", unique("deploy")));
        let files =
            here(Command::new("tar").args(["-C", ROOT, "-c", "deploy", "sandbox/config.example.toml"]));
        let _ = sh_with_input(&format!("mkdir {0} && tar -x -C {0}", place.0), &files).ok();
        place
    }

    /// Runs a script in it. `$HERE` is its path; `$FILES` a tree of small files in the place of the real ones.
    fn sh(&self, script: &str) -> kata_rs_tests::Outcome {
        sh(&format!(
            "set -eu; HERE={0}; FILES=$HERE/files; cd $HERE; \
             if [ ! -e $FILES ]; then mkdir -p $FILES/bin $FILES/lib/kata-rs; \
             for f in bin/kata-rs bin/containerd-shim-kata-rs-v2 bin/kata-rs-image \
             lib/kata-rs/kata-rs-vmm lib/kata-rs/kata-rs-task lib/kata-rs/vmlinux lib/kata-rs/guest.img; \
             do echo $f > $FILES/$f; done; fi\n{script}",
            self.0
        ))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = sh(&format!("rm -rf {}", self.0));
    }
}

fn lines(text: &str) -> BTreeSet<&str> {
    text.lines().collect()
}

/// How a machine looks before, what the installer is asked for, and where its words must be found then.
struct Layout {
    name: &'static str,
    /// Path and text; a text that is empty makes a directory.
    before: &'static [(&'static str, &'static str)],
    /// Without the word `--configure` the files are installed, too.
    options: &'static str,
    after: &'static [(&'static str, &'static str)],
}

const RUNTIME_3: &str = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata-rs]";
const RUNTIME_2: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata-rs]";

const LAYOUTS: &[Layout] = &[
    Layout {
        name: "containerd 2 without imports",
        before: &[(
            "etc/containerd/config.toml",
            "# mine\nversion = 3\noom_score = 1\n[debug]\n  level = 'info'\n",
        )],
        options: "--configure",
        after: &[
            (
                "etc/containerd/config.toml",
                "version = 3\nimports = ['/etc/containerd/conf.d/kata-rs*.toml']  # added",
            ),
            ("etc/containerd/conf.d/kata-rs.toml", RUNTIME_3),
            (
                "etc/containerd/conf.d/kata-rs.toml",
                "runtime_path = '/usr/local/bin/containerd-shim-kata-rs-v2'",
            ),
        ],
    },
    Layout {
        name: "containerd 2 that imports the directory, with erofs",
        before: &[(
            "etc/containerd/config.toml",
            "version = 3\nimports = [\n  'conf.d/*.toml', # mine\n]\n",
        )],
        options: "--snapshotter erofs --prefix /opt/kata-rs",
        after: &[
            ("etc/containerd/conf.d/kata-rs.toml", "\n  snapshotter = 'erofs'"),
            (
                "etc/containerd/conf.d/kata-rs.toml",
                "runtime_path = '/opt/kata-rs/bin/containerd-shim-kata-rs-v2'",
            ),
            (
                "etc/containerd/conf.d/kata-rs-erofs.toml",
                "default = ['erofs', 'walking']",
            ),
        ],
    },
    Layout {
        name: "containerd 2 that imports something else",
        before: &[(
            "etc/containerd/config.toml",
            "version = 3\nimports = ['/srv/*.toml']\n",
        )],
        options: "--configure",
        after: &[("etc/containerd/config.toml", RUNTIME_3)],
    },
    Layout {
        name: "no configuration yet",
        before: &[("etc/containerd", "")],
        options: "--configure",
        after: &[
            ("etc/containerd/config.toml", "version = 3\nimports"),
            ("etc/containerd/conf.d/kata-rs.toml", RUNTIME_3),
        ],
    },
    Layout {
        name: "containerd 1.7",
        before: &[(
            "etc/containerd/config.toml",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"x\"\n",
        )],
        options: "",
        after: &[
            ("etc/containerd/config.toml", RUNTIME_2),
            ("etc/containerd/config.toml", "containerd.runtimes.runc]"),
            ("etc/kata-rs/config.toml", "\ntask_api = \"2\""),
        ],
    },
    Layout {
        name: "k3s that imports a directory",
        before: &[(
            "var/lib/rancher/k3s/agent/etc/containerd/config.toml",
            "version = 3\nimports = ['/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/*.toml']\n",
        )],
        options: "--configure",
        after: &[(
            "var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/kata-rs.toml",
            RUNTIME_3,
        )],
    },
    Layout {
        name: "k3s without a template",
        before: &[(
            "var/lib/rancher/k3s/agent/etc/containerd/config.toml",
            "version = 3\n",
        )],
        options: "--configure",
        after: &[
            (
                "var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.tmpl",
                "{{ template \"base\" . }}\n",
            ),
            (
                "var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.tmpl",
                RUNTIME_3,
            ),
        ],
    },
    Layout {
        name: "RKE2 with a template of containerd 1.7",
        before: &[
            (
                "var/lib/rancher/rke2/agent/etc/containerd/config.toml",
                "version = 2\n",
            ),
            (
                "var/lib/rancher/rke2/agent/etc/containerd/config.toml.tmpl",
                "{{ template \"base\" . }}\n[x]\n",
            ),
        ],
        options: "--configure",
        after: &[(
            "var/lib/rancher/rke2/agent/etc/containerd/config.toml.tmpl",
            RUNTIME_2,
        )],
    },
    Layout {
        name: "CRI-O",
        before: &[("etc/crio", "")],
        options: "--configure",
        after: &[(
            "etc/crio/crio.conf.d/50-kata-rs.conf",
            "[crio.runtime.runtimes.kata-rs]\nruntime_type = \"vm\"",
        )],
    },
];

#[test]
fn each_kind_of_machine_is_told_once_and_gets_everything_back() {
    let place = Place::new();
    for layout in LAYOUTS {
        let Layout { name, options, .. } = layout;
        let mut script = "R=$HERE/root; rm -rf $R $R.before; mkdir $R\n".to_owned();
        for (path, text) in layout.before {
            if text.is_empty() {
                script += &format!("mkdir -p $R/{path}\n");
            } else {
                script += &format!("mkdir -p $(dirname $R/{path}); cat > $R/{path} <<'TEXT'\n{text}TEXT\n");
            }
        }
        script += &format!(
            "cp -a $R $R.before\n\
             run() {{ deploy/install --root $R --from $FILES --skip-check {options} \"$@\"; }}\n\
             run --dry-run >/dev/null; diff -r $R.before $R\n\
             run >/dev/null\n"
        );
        let _ = place.sh(&script).ok();
        for (path, words) in layout.after {
            let text = place.sh(&format!("cat root/{path}"));
            assert!(text.ok().contains(words.trim_end()), "{name}: {path}: {text:#?}");
        }
        let again = place.sh(&format!(
            "cp -a root root.told; deploy/install --root $HERE/root --from $FILES --skip-check {options}; diff -r root.told root; rm -r root.told"
        ));
        for word in ["  write", "  edit", "  remove", "Restart"] {
            assert!(!again.ok().contains(word), "{name}: {again:#?}");
        }
        let gone = place.sh(&format!(
            "deploy/install {} --root $HERE/root; \
             find root -type d -empty -delete; find root.before -type d -empty -delete; mkdir -p root root.before; diff -r root.before root",
            if options.contains("--configure") {
                "--unconfigure".to_owned()
            } else {
                format!("--uninstall {options}")
            }
        ));
        assert_eq!(gone.status, 0, "{name}: {gone:#?}");
    }
}

#[test]
fn what_cannot_be_is_said_with_its_cure_and_changes_nothing() {
    let place = Place::new();
    let file = "etc/containerd/config.toml";
    for (text, options, words) in [
        (
            "version = 2",
            "--sandboxer shim",
            "needs a containerd configuration of version 3",
        ),
        ("version = 2", "--snapshotter erofs", "containerd config migrate"),
        ("[debug]", "", "configuration version 1"),
        ("version = 3", "--for k3s", "start k3s once"),
        (
            "version = 3",
            "--for nothing",
            "not one of containerd, k3s, rke2, crio, none",
        ),
        ("version = 3", "--sandboxer other", "neither podsandbox nor shim"),
        ("version = 3", "--snapshotter 'a b'", "no name of a snapshotter"),
        ("version = 3", "--prefix relative", "not an absolute path"),
        (
            "version = 3",
            "--config /etc/none.toml",
            "/etc/none.toml does not exist",
        ),
        ("version = 3", "--nonsense", "unknown word: --nonsense"),
        (
            "version = 3",
            "--restart-with false --for containerd",
            "the restart failed",
        ),
    ] {
        let outcome = place.sh(&format!(
            "R=$HERE/root; rm -rf $R; mkdir -p $R/etc/containerd; echo '{text}' > $R/{file}; \
             if deploy/install --configure --root $R {options} >/dev/null; then exit 9; fi; {}",
            if options.contains("restart") {
                "true".to_owned()
            } else {
                format!("echo '{text}' | cmp - $R/{file}")
            }
        ));
        assert_eq!(outcome.status, 0, "{text} {options}: {outcome:#?}");
        assert!(outcome.stderr.contains(words), "{text} {options}: {outcome:#?}");
    }
    // Without anything to tell; and on a machine that has no KVM.
    let nothing = place.sh("mkdir -p empty; ! deploy/install --configure --root $HERE/empty");
    assert!(
        nothing.stderr.contains("neither containerd nor k3s"),
        "{nothing:#?}"
    );
    let unfit = place.sh(
        "mkdir -p unfit; cp -a files files.unfit; printf '#!/bin/sh\necho \"BAD  kvm\"; exit 1\n' > files.unfit/bin/kata-rs; \
         printf 'version = 3\n' > unfit.toml; \
         if deploy/install --prefix $HERE/unfit --from $HERE/files.unfit --config $HERE/unfit.toml >/dev/null; then exit 9; fi; \
         deploy/uninstall --force --prefix $HERE/unfit >/dev/null; cat unfit.toml; ! ls unfit",
    );
    assert_eq!(unfit.ok(), "version = 3", "{unfit:#?}");
    assert!(
        unfit.stderr.contains("BAD  kvm") && unfit.stderr.contains("--skip-check"),
        "{unfit:#?}"
    );
}

#[test]
fn a_containerd_that_was_told_runs_the_runtime_that_was_installed() {
    let place = Place::new();
    // A second containerd beside the machine's own, with a configuration of its own. The drop-in's directory is found
    // through the line that the installer adds.
    let told = place.sh(
        "S=/run/$(basename $HERE); echo $S > state\n\
         cat > config.toml <<TEXT\n\
         version = 3\n\
         root = '$HERE/lib'\n\
         state = '$S'\n\
         [grpc]\n  address = '$S/c.sock'\n\
         [plugins.'io.containerd.nri.v1.nri']\n  disable = true\n\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = 'localhost/pause:1'\n\
         [plugins.'io.containerd.cri.v1.runtime'.cni]\n  bin_dirs = ['/usr/lib/cni', '/opt/cni/bin']\n\
         TEXT\n\
         cp config.toml before.toml\n\
         cat > restart <<TEXT\n\
         containerd --config $HERE/config.toml >$HERE/log 2>&1 </dev/null &\n\
         echo \\$! >$HERE/pid\n\
         TEXT\n\
         deploy/install --from /usr/local --prefix $HERE/prefix --config $HERE/config.toml --restart-with \"sh $HERE/restart\"\n\
         i=0; until ctr -a $S/c.sock version >/dev/null 2>&1; do i=$((i+1)); [ $i -lt 300 ]; sleep 0.2; done\n\
         containerd --config $HERE/config.toml config dump",
    );
    let runtime = "containerd.runtimes.kata-rs]";
    assert!(
        told.ok().contains(runtime) && told.stdout.contains("prefix/bin/containerd-shim-kata-rs-v2'"),
        "{told:#?}"
    );
    assert!(told.stdout.contains("  run     sh "), "{told:#?}");
    let ran = place.sh(&format!(
        "C=\"ctr -a $(cat state)/c.sock\"; $C image import {IMAGES}/busybox.oci.tar >/dev/null; \
         $C run --rm --runtime $HERE/prefix/bin/containerd-shim-kata-rs-v2 {BUSYBOX} t1 uname -r; uname -r"
    ));
    let kernels: Vec<&str> = ran.ok().lines().collect();
    assert!(
        kernels.len() == 2 && kernels[0] != kernels[1] && kernels[0].contains("kata-rs"),
        "{ran:#?}"
    );
    // A pod: the handler of the drop-in, the shim by its path.
    let pod = place.sh(&format!(
        "S=$(cat state); for i in busybox pause; do ctr -a $S/c.sock -n k8s.io image import {IMAGES}/$i.oci.tar >/dev/null; done\n\
         cat > pod.json <<TEXT\n\
         {{\"metadata\": {{\"name\": \"$(basename $HERE)\", \"namespace\": \"deploy\", \"uid\": \"$(basename $HERE)\"}}, \"log_directory\": \"$HERE\", \"linux\": {{}}}}\n\
         TEXT\n\
         cat > container.json <<TEXT\n\
         {{\"metadata\": {{\"name\": \"c\"}}, \"image\": {{\"image\": \"{BUSYBOX}\"}}, \"command\": [\"sleep\", \"3600\"], \"log_path\": \"c.log\"}}\n\
         TEXT\n\
         C=\"crictl -r unix://$S/c.sock -i unix://$S/c.sock\"\n\
         id=$($C run --no-pull --runtime kata-rs container.json pod.json)\n\
         $C exec $id uname -r; ls -l /proc/[0-9]*/exe | grep -c \"$HERE/prefix/bin/containerd-shim-kata-rs-v2\"\n\
         if deploy/uninstall --prefix $HERE/prefix 2>refused; then exit 9; fi; grep -c 'are running' refused\n\
         $C rmp -f $($C pods -q) >/dev/null"
    ));
    let lines: Vec<&str> = pod.ok().lines().collect();
    assert!(
        lines.len() == 3 && lines[0] == kernels[0] && lines[1..] == ["1", "1"],
        "{pod:#?}"
    );
    let gone = place.sh(
        "kill $(cat pid); while [ -e /proc/$(cat pid) ]; do sleep 0.1; done; \
         deploy/uninstall --prefix $HERE/prefix >/dev/null; cmp before.toml config.toml; ! ls prefix conf.d 2>/dev/null; \
         rm -rf $(cat state)",
    );
    assert_eq!(gone.status, 0, "{gone:#?}");
}

#[test]
fn the_debian_package_runs_containers_and_leaves_nothing() {
    if sh("command -v dpkg").status != 0 || Command::new("dpkg-deb").arg("--version").output().is_err() {
        println!("skipped: there is no dpkg here");
        return;
    }
    if sh("test -e /etc/kata-rs || dpkg -s kata-rs").status == 0 {
        println!("skipped: the package's removal would take this machine's configuration of kata-rs away");
        return;
    }
    let stage = Path::new(ROOT).join("target/stage");
    let output = std::env::temp_dir().join(unique("deb"));
    std::fs::create_dir(&output).expect("a directory for the package");
    let built = here(
        Command::new(Path::new(ROOT).join("deploy/debian/build"))
            .args([&stage, &output])
            .env("SOURCE_DATE_EPOCH", "1767225600"),
    );
    let package =
        std::fs::read(String::from_utf8_lossy(&built).trim()).expect("the package is where build says");
    std::fs::remove_dir_all(&output).expect("the package can be removed");

    let place = Place::new();
    let _aside = Aside::new("/var/lib/kata-rs");
    let listing = "find /etc /usr /var/lib/kata-rs -xdev 2>/dev/null | grep -v -e __pycache__ -e /etc/ld.so.cache | sort";
    let before = place.sh(listing);
    let _ = sh_with_input(&format!("cat > {}/kata-rs.deb", place.0), &package).ok();
    let installed = place.sh("dpkg -i kata-rs.deb 2>&1; dpkg -V kata-rs; /usr/bin/kata-rs check");
    assert!(
        installed.ok().contains("/usr/lib/kata-rs/vmlinux") && !installed.stdout.contains("BAD"),
        "{installed:#?}"
    );
    let ran = place.sh(&format!(
        "/usr/bin/kata-rs run --rm {IMAGES}/busybox.oci.tar echo by hand; \
         ctr run --rm --runtime /usr/bin/containerd-shim-kata-rs-v2 {BUSYBOX} {} echo through containerd",
        unique("d")
    ));
    assert_eq!(ran.ok(), "by hand\nthrough containerd", "{ran:#?}");
    let told = place.sh(
        "printf 'version = 3\\n' > config.toml; kata-rs-configure --config $HERE/config.toml >/dev/null; cat config.toml conf.d/*",
    );
    assert!(
        told.ok()
            .contains("runtime_path = '/usr/bin/containerd-shim-kata-rs-v2'"),
        "{told:#?}"
    );
    let removed = place.sh(
        "dpkg -r kata-rs 2>&1; cat config.toml; ! ls conf.d 2>/dev/null; test -e /etc/kata-rs/config.toml",
    );
    assert!(removed.ok().ends_with("version = 3"), "{removed:#?}");
    let _ = place.sh("dpkg -P kata-rs 2>&1").ok();
    let after = place.sh(listing);
    let (before, after) = (lines(before.ok()), lines(after.ok()));
    assert_eq!(
        after.difference(&before).copied().collect::<Vec<_>>(),
        [""; 0],
        "left"
    );
    assert_eq!(
        before.difference(&after).copied().collect::<Vec<_>>(),
        [""; 0],
        "taken away"
    );
}

#[test]
fn the_image_of_the_daemonset_installs_on_its_node_and_labels_it() {
    if std::env::var("KATA_RS_TARGET").as_deref() == Ok("direct") {
        println!("skipped: the image is built from Debian packages, for the emulated host only");
        return;
    }
    let output = std::env::temp_dir().join(unique("image"));
    std::fs::create_dir(&output).expect("a directory for the image");
    let built = here(
        Command::new(Path::new(ROOT).join("deploy/image/build"))
            .args([&Path::new(ROOT).join("target/stage"), &output])
            .env("IMAGE", "localhost/kata-rs-installer:test"),
    );
    let image = std::fs::read(String::from_utf8_lossy(&built).trim()).expect("the image is where build says");
    std::fs::remove_dir_all(&output).expect("the image can be removed");

    let place = Place::new();
    let _ = sh_with_input("ctr image import - >/dev/null", &image).ok();
    // A node with a containerd, and an API server that writes down what it is asked.
    let _ = place.sh(
        r#"mkdir -p node/etc/containerd account; printf 'version = 3\n' > node/etc/containerd/config.toml; cp -a node node.before
           echo secret > account/token; touch account/ca.crt
           cat > api.py <<'TEXT'
import http.server, sys
class Api(http.server.BaseHTTPRequestHandler):
    def do_PATCH(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with open("asked", "a") as asked:
            print(self.path, self.headers["Authorization"], self.headers["Content-Type"], body, file=asked)
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 0), Api)
with open("port", "w") as port:
    port.write(str(server.server_port))
server.serve_forever()
TEXT
           python3 api.py >/dev/null 2>&1 </dev/null &
           echo $! > api.pid; i=0; until [ -s port ]; do i=$((i+1)); [ $i -lt 300 ]; sleep 0.1; done"#,
    )
    .ok();
    let run = |action: &str| {
        place.sh(&format!(
            "id=installer-$(basename $HERE)\n\
             gone() {{ ctr task kill -s $1 $id 2>/dev/null; i=0; while ctr task ls -q | grep -qx $id && ! ctr task rm $id >/dev/null 2>&1; \
             do i=$((i+1)); [ $i -lt 50 ] || ctr task kill -s KILL $id; sleep 0.2; done; ctr c rm $id 2>/dev/null; }}\n\
             trap 'gone KILL || true' EXIT\n\
             ctr run -d --privileged --net-host --log-uri file://$HERE/{action}.log \
             --mount type=bind,src=$HERE/node,dst=/host,options=rbind:rw \
             --mount type=bind,src=$HERE/account,dst=/var/run/secrets/kubernetes.io/serviceaccount,options=rbind:ro \
             --env NODE_NAME=node-1 --env KATA_RS_API=http://127.0.0.1:$(cat port) \
             --env 'INSTALL_OPTIONS=--skip-check --restart-with echo' \
             localhost/kata-rs-installer:test $id /kata-rs/deploy/image/node {action}\n\
             i=0; until ctr task exec --exec-id ready$i $id test -e /run/kata-rs-done 2>/dev/null; \
             do i=$((i+1)); [ $i -lt 60 ] || {{ cat {action}.log >&2; exit 1; }}; sleep 0.5; done\n\
             cat {action}.log; gone TERM",
        ))
    };
    let installed = run("install");
    assert!(
        installed.ok().contains("write   /host/usr/local/bin/kata-rs"),
        "{installed:#?}"
    );
    let node = place.sh("cat node/etc/containerd/config.toml node/etc/containerd/conf.d/*; cat asked");
    assert!(
        node.ok()
            .contains("imports = ['/etc/containerd/conf.d/kata-rs*.toml']"),
        "{node:#?}"
    );
    assert!(
        node.stdout.contains(
            "/api/v1/nodes/node-1 Bearer secret application/strategic-merge-patch+json {\"metadata\":{\"labels\":{\"kata-rs/ready\":\"true\"}}}"
        ),
        "{node:#?}"
    );
    let uninstalled = run("uninstall");
    assert_eq!(uninstalled.status, 0, "{uninstalled:#?}");
    let node = place.sh(
        "tail -n 1 asked; kill $(cat api.pid); find node -type d -empty -delete; diff -r node.before node; \
         ctr image rm localhost/kata-rs-installer:test >/dev/null",
    );
    assert!(node.ok().ends_with("{\"kata-rs/ready\":null}}}"), "{node:#?}");
}
