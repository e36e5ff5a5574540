//! The file system that the guest mounts: a root directory whose entries are the shares.
//!
//! A node id is the share's place in the upper 8 bits and the share's own inode number in the others; place 0
//! is the root. No request on the root is answered with `ENOSYS`: the guest's kernel would take that as "not
//! supported anywhere" and never ask again.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FsOptions, OpenOptions, ROOT_ID, SetattrValid, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::api::{VFS_MAX_INO, validate_path_component};

use super::share::{errno, open_flags};
use super::table::{PLACE_SHIFT, Tree, join};
use super::thread::Umask;
use super::xattr;

/// The most that Linux stores in one extended attribute, or lists (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_XATTR: u32 = 64 * 1024;
/// The most directory entries, in bytes, that one request gets.
const MAX_READDIR: u32 = 1 << 20;
/// How often a directory is read again because an entry vanished while it was looked at.
const READDIR_ATTEMPTS: u32 = 3;

/// Reads a directory again when an entry vanished before anything was read.
fn patiently(mut read: impl FnMut(&mut bool) -> io::Result<()>) -> io::Result<()> {
    let mut attempt = 1;
    loop {
        let mut emitted = false;
        match read(&mut emitted) {
            Err(error)
                if error.raw_os_error() == Some(libc::ENOENT) && !emitted && attempt < READDIR_ATTEMPTS =>
            {
                attempt += 1;
            }
            other => return other,
        }
    }
}

fn root_attributes() -> stat64 {
    let mut attributes = Entry::default().attr;
    attributes.st_ino = ROOT_ID;
    attributes.st_mode = libc::S_IFDIR | 0o755;
    attributes.st_nlink = 2;
    attributes.st_blksize = 4096;
    attributes
}

impl FileSystem for Tree {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // Without WRITEBACK_CACHE: it holds for the whole mount, and its guest believes sizes and times of its own
        // even where others change the files.
        let wanted = FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::BIG_WRITES
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::DO_READDIRPLUS
            | FsOptions::DONT_MASK
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::INIT_EXT
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::POSIX_ACL
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::SUBMOUNTS;
        let options = wanted & capable;
        self.agree(options)?;
        Ok(options)
    }

    fn destroy(&self) {
        self.forget_all();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if parent == ROOT_ID {
            let name = name.to_str().map_err(|_| errno(libc::ENOENT))?;
            let (near, share) = self.named(name)?;
            return Ok(join(&share, near, share.root()?));
        }
        let (share, inode) = self.live(parent)?;
        Ok(join(&share, parent, share.lookup(inode, name)?))
    }

    fn forget(&self, context: &Context, node: u64, count: u64) {
        if let Ok((share, inode)) = self.share(node) {
            share.files.forget(context, inode, count);
        }
    }

    fn getattr(&self, context: &Context, node: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        if node == ROOT_ID {
            return Ok((root_attributes(), Duration::from_secs(1)));
        }
        let (share, inode) = self.share(node)?;
        let (mut attributes, timeout) = share.files.getattr(context, inode, handle)?;
        attributes.st_ino = node;
        Ok((attributes, timeout))
    }

    fn setattr(
        &self,
        context: &Context,
        node: u64,
        attributes: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (share, inode) = self.share(node)?;
        let (mut attributes, timeout) = share.files.setattr(context, inode, attributes, handle, valid)?;
        attributes.st_ino = node;
        Ok((attributes, timeout))
    }

    fn readlink(&self, context: &Context, node: u64) -> io::Result<Vec<u8>> {
        let (share, inode) = self.share(node)?;
        share.files.readlink(context, inode)
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        validate_path_component(name)?;
        let (share, inode) = self.live(parent)?;
        Ok(join(
            &share,
            parent,
            share.files.symlink(context, target, inode, name)?,
        ))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        validate_path_component(name)?;
        let (share, inode) = self.live(parent)?;
        let _umask = Umask::of_guest(umask);
        Ok(join(
            &share,
            parent,
            share.files.mknod(context, inode, name, mode, device, 0)?,
        ))
    }

    fn mkdir(&self, context: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        validate_path_component(name)?;
        let (share, inode) = self.live(parent)?;
        let _umask = Umask::of_guest(umask);
        Ok(join(
            &share,
            parent,
            share.files.mkdir(context, inode, name, mode, 0)?,
        ))
    }

    fn unlink(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        validate_path_component(name)?;
        let (share, inode) = self.live(parent)?;
        share.files.unlink(context, inode, name)
    }

    fn rmdir(&self, context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        validate_path_component(name)?;
        let (share, inode) = self.live(parent)?;
        share.files.rmdir(context, inode, name)
    }

    fn rename(
        &self,
        context: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        validate_path_component(old_name)?;
        validate_path_component(new_name)?;
        let (share, old, new) = self.live_pair(old_parent, new_parent)?;
        share.files.rename(context, old, old_name, new, new_name, flags)
    }

    fn link(&self, context: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        validate_path_component(name)?;
        let (share, inode, directory) = self.live_pair(node, parent)?;
        Ok(join(&share, parent, share.link(context, inode, directory, name)?))
    }

    fn open(
        &self,
        context: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = open_flags(flags)?;
        let (share, inode) = self.share(node)?;
        let (handle, options, _) = share.opening(|files| files.open(context, inode, flags, fuse_flags))?;
        Ok((handle, share.opened(options, flags), None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        arguments: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        validate_path_component(name)?;
        let exclusive = arguments.flags & libc::O_EXCL as u32;
        let flags = open_flags(arguments.flags)?;
        let (share, inode) = self.share(parent)?;
        let _umask = Umask::of_guest(arguments.umask);
        let arguments = CreateIn {
            flags: flags | exclusive,
            umask: 0,
            ..arguments
        };
        let (entry, handle, options, _) =
            share.opening(|files| files.create(context, inode, name, arguments))?;
        Ok((
            join(&share, parent, entry),
            handle,
            share.opened(options, flags),
            None,
        ))
    }

    fn read(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let (share, inode) = self.share(node)?;
        share.files.read(
            context,
            inode,
            handle,
            writer,
            size,
            offset,
            lock_owner,
            open_flags(flags)?,
        )
    }

    fn write(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let (share, inode) = self.share(node)?;
        let flags = open_flags(flags)?;
        share.files.write(
            context, inode, handle, reader, size, offset, lock_owner, delayed, flags, fuse_flags,
        )
    }

    fn flush(&self, context: &Context, node: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        let (share, inode) = self.share(node)?;
        share.files.flush(context, inode, handle, lock_owner)
    }

    fn fsync(&self, context: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let (share, inode) = self.share(node)?;
        share.files.fsync(context, inode, data_only, handle)
    }

    fn fallocate(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (share, inode) = self.share(node)?;
        share
            .files
            .fallocate(context, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        context: &Context,
        node: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let (share, inode) = self.share(node)?;
        share
            .files
            .release(context, inode, flags, handle, flush, flock_release, lock_owner)?;
        self.close(node, share);
        Ok(())
    }

    fn statfs(&self, context: &Context, node: u64) -> io::Result<statvfs64> {
        if node == ROOT_ID {
            // SAFETY: all fields are plain numbers, for which zero is valid.
            let mut status: statvfs64 = unsafe { std::mem::zeroed() };
            status.f_namemax = 255;
            status.f_bsize = 4096;
            return Ok(status);
        }
        let (share, inode) = self.share(node)?;
        share.files.statfs(context, inode)
    }

    fn setxattr(
        &self,
        context: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let (share, inode) = self.live(node)?;
        share
            .files
            .setxattr(context, inode, &xattr::on_host(name)?, value, flags)
    }

    fn getxattr(&self, context: &Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        if node == ROOT_ID {
            return Err(errno(libc::ENODATA));
        }
        let (share, inode) = self.share(node)?;
        let on_host = xattr::on_host(name).map_err(|_| errno(libc::ENODATA))?;
        let value = share
            .files
            .getxattr(context, inode, &on_host, size.min(MAX_XATTR));
        match value {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) && xattr::is_acl(name) => {
                Err(errno(libc::ENODATA))
            }
            value => value,
        }
    }

    fn listxattr(&self, context: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        if node == ROOT_ID {
            return Ok(if size == 0 {
                ListxattrReply::Count(0)
            } else {
                ListxattrReply::Names(Vec::new())
            });
        }
        let (share, inode) = self.share(node)?;
        // All of them: names are shorter in the guest than on the host.
        let names = match share.files.listxattr(context, inode, MAX_XATTR)? {
            ListxattrReply::Names(names) => xattr::in_guest(&names),
            ListxattrReply::Count(_) => Vec::new(),
        };
        match (size as usize, names.len()) {
            (0, length) => Ok(ListxattrReply::Count(length as u32)),
            (room, length) if room < length => Err(errno(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn removexattr(&self, context: &Context, node: u64, name: &CStr) -> io::Result<()> {
        let (share, inode) = self.live(node)?;
        share.files.removexattr(context, inode, &xattr::on_host(name)?)
    }

    fn opendir(&self, context: &Context, node: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        if node == ROOT_ID {
            return Ok((Some(0), OpenOptions::empty()));
        }
        let flags = open_flags(flags)?;
        let (share, inode) = self.share(node)?;
        share.opening(|files| files.opendir(context, inode, flags))
    }

    fn readdir(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        emit: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        if node == ROOT_ID {
            return self.list(offset, &mut |listed, _| emit(listed));
        }
        let (share, inode) = self.share(node)?;
        let size = size.min(MAX_READDIR);
        patiently(|emitted| {
            share
                .files
                .readdir(context, inode, handle, size, offset, &mut |mut listed| {
                    *emitted = true;
                    listed.ino = node >> PLACE_SHIFT << PLACE_SHIFT | listed.ino & VFS_MAX_INO;
                    emit(listed)
                })
        })
    }

    fn readdirplus(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        emit: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if node == ROOT_ID {
            return self.list(offset, emit);
        }
        let (share, inode) = self.share(node)?;
        share.check()?;
        let size = size.min(MAX_READDIR);
        patiently(|emitted| {
            share
                .files
                .readdirplus(context, inode, handle, size, offset, &mut |mut listed, entry| {
                    *emitted = true;
                    let entry = join(&share, node, share.announce(inode, entry));
                    listed.ino = entry.inode;
                    emit(listed, entry)
                })
        })
    }

    fn fsyncdir(&self, context: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        if node == ROOT_ID {
            return Ok(());
        }
        let (share, inode) = self.share(node)?;
        share.files.fsyncdir(context, inode, data_only, handle)
    }

    fn releasedir(&self, context: &Context, node: u64, flags: u32, handle: u64) -> io::Result<()> {
        if node == ROOT_ID {
            return Ok(());
        }
        let (share, inode) = self.share(node)?;
        share.files.releasedir(context, inode, flags, handle)?;
        self.close(node, share);
        Ok(())
    }

    fn access(&self, context: &Context, node: u64, mask: u32) -> io::Result<()> {
        if node == ROOT_ID {
            return Ok(());
        }
        let (share, inode) = self.share(node)?;
        share.files.access(context, inode, mask)
    }

    fn lseek(&self, context: &Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let (share, inode) = self.share(node)?;
        share.files.lseek(context, inode, handle, offset, whence)
    }
}
