# Sourced by the build scripts: one way to call mmdebstrap.
#
# debian SUITE TARGET ARGUMENT...   TARGET is a tar file or a directory; MIRROR comes from the caller.
debian() {
    local suite=$1 target=$2
    shift 2
    # A mirror may lag behind the archive: the Release file of testing is valid for a week only.
    # Translations, manuals and changelogs would double the time and the size.
    mmdebstrap --mode=root \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --aptopt='Acquire::Languages "none"' \
        --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt=force-unsafe-io \
        "$@" "$suite" "$target" "deb $MIRROR $suite main"
}
