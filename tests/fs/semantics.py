#!/usr/bin/env python3
"""What Linux programs may expect of a file system, beyond POSIX: run in a directory of the file system, as root.

    semantics.py PART/PARTS DIRECTORY SMALL READONLY

Runs one of PARTS equal parts of the list, in a container that is thrown away: the cases named `image_` change files
of its Debian image, on the root file system whatever DIRECTORY is. SMALL is a directory of a file system that is soon
full, READONLY one that cannot be written. Prints one line for each case: `ok NAME`, or `FAIL NAME: why`. The same list
runs on every file system; what matters is where two of them differ.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import select
import shutil
import socket
import stat
import struct
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 1, 2, 8, 16
CASES = []


def case(function):
    CASES.append(function)
    return function


def same(found, wanted, what=""):
    if found != wanted:
        raise AssertionError(f"{what}: {found!r} instead of {wanted!r}")


def fails(number, call, *arguments, **named):
    try:
        result = call(*arguments, **named)
    except OSError as error:
        same(errno.errorcode.get(error.errno), errno.errorcode[number], call.__name__)
        return
    raise AssertionError(f"{getattr(call, '__name__', call)} gave {result!r} instead of {errno.errorcode[number]}")


def system(name, *arguments):
    """A call of the C library that reports by errno."""
    converted = [a.encode() if isinstance(a, str) else a for a in arguments]
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in converted]
    result = getattr(libc, name)(*converted)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def rename(old, new, flags):
    return system("renameat2", AT_FDCWD, old, AT_FDCWD, new, flags)


def fallocate(fd, mode, offset, length):
    return system("fallocate", fd, mode, offset, length)


def put(path, content=b""):
    with open(path, "wb") as file:
        file.write(content)


def get(path):
    with open(path, "rb") as file:
        return file.read()


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def as_user(uid, work, gid=None, groups=()):
    """Runs work as another user; its exception is this process's."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = b""
        try:
            os.setgroups(groups)
            os.setgid(uid if gid is None else gid)
            os.setuid(uid)
            work()
        except BaseException as error:  # noqa: BLE001: all of it goes to the parent
            text = repr(error).encode()
        os.write(writer, text or b"+")
        os._exit(0)
    os.close(writer)
    text = os.read(reader, 65536)
    os.close(reader)
    os.waitpid(child, 0)
    if text != b"+":
        raise AssertionError(f"as user {uid}: {text.decode()}")


def acl(*entries):
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ANY = 0xFFFFFFFF


# Extended attributes and access control lists


@case
def xattr_user_set_get_list_remove():
    put("f")
    os.setxattr("f", "user.a", b"1")
    os.setxattr("f", "user.b", b"")
    same(os.getxattr("f", "user.a"), b"1")
    same(os.getxattr("f", "user.b"), b"")
    same(sorted(os.listxattr("f")), ["user.a", "user.b"])
    os.removexattr("f", "user.a")
    same(os.listxattr("f"), ["user.b"])
    fails(errno.ENODATA, os.getxattr, "f", "user.a")
    fails(errno.ENODATA, os.removexattr, "f", "user.a")


@case
def xattr_create_and_replace():
    put("f")
    fails(errno.ENODATA, os.setxattr, "f", "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr("f", "user.a", b"1", os.XATTR_CREATE)
    fails(errno.EEXIST, os.setxattr, "f", "user.a", b"2", os.XATTR_CREATE)
    os.setxattr("f", "user.a", b"2", os.XATTR_REPLACE)
    same(os.getxattr("f", "user.a"), b"2")


@case
def xattr_on_directory_and_descriptor():
    os.mkdir("d")
    os.setxattr("d", "user.a", b"1")
    fd = os.open("d", os.O_RDONLY)
    same(os.getxattr(fd, "user.a"), b"1")
    os.close(fd)


@case
def xattr_value_of_1000_bytes():
    put("f")
    os.setxattr("f", "user.long", b"x" * 1000)
    same(os.getxattr("f", "user.long"), b"x" * 1000)


@case
def xattr_name_too_long():
    put("f")
    fails(errno.ERANGE, os.setxattr, "f", "user." + "n" * 251, b"")


@case
def xattr_user_on_symlink_refused():
    os.symlink("x", "l")
    fails(errno.EPERM, os.setxattr, "l", "user.a", b"", follow_symlinks=False)


@case
def xattr_trusted():
    put("f")
    os.setxattr("f", "trusted.a", b"1")
    same(os.getxattr("f", "trusted.a"), b"1")
    same("trusted.a" in os.listxattr("f"), True)
    os.removexattr("f", "trusted.a")
    fails(errno.ENODATA, os.getxattr, "f", "trusted.a")


@case
def xattr_trusted_of_nobody_refused():
    put("f")
    os.chmod("f", 0o666)
    as_user(1000, lambda: fails(errno.EPERM, os.setxattr, "f", "trusted.a", b""))


@case
def xattr_survives_rename_and_link():
    put("f")
    os.setxattr("f", "user.a", b"1")
    os.rename("f", "g")
    os.link("g", "h")
    same(os.getxattr("h", "user.a"), b"1")


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


@case
def capability_set_and_lost_on_write():
    put("f", b"x")
    os.setxattr("f", "security.capability", CAPABILITY)
    same(os.getxattr("f", "security.capability"), CAPABILITY)
    with open("f", "ab") as file:
        file.write(b"y")
    fails(errno.ENODATA, os.getxattr, "f", "security.capability")


@case
def capability_lost_on_chown():
    put("f")
    os.setxattr("f", "security.capability", CAPABILITY)
    os.chown("f", 1, 1)
    fails(errno.ENODATA, os.getxattr, "f", "security.capability")


@case
def acl_grants_to_a_user():
    put("f", b"secret")
    os.chmod("f", 0o600)
    as_user(1000, lambda: fails(errno.EACCES, get, "f"))
    os.setxattr("f", "system.posix_acl_access", acl((1, 6, ANY), (2, 4, 1000), (4, 0, ANY), (16, 4, ANY), (32, 0, ANY)))
    same(mode("f"), 0o640)
    as_user(1000, lambda: same(get("f"), b"secret"))
    as_user(1001, lambda: fails(errno.EACCES, get, "f"))


@case
def acl_mask_follows_chmod():
    put("f", b"secret")
    os.setxattr("f", "system.posix_acl_access", acl((1, 6, ANY), (2, 6, 1000), (4, 0, ANY), (16, 6, ANY), (32, 0, ANY)))
    os.chmod("f", 0o600)
    as_user(1000, lambda: fails(errno.EACCES, get, "f"))
    os.removexattr("f", "system.posix_acl_access")
    fails(errno.ENODATA, os.getxattr, "f", "system.posix_acl_access")


@case
def acl_default_is_inherited_past_the_umask():
    os.mkdir("d")
    os.setxattr("d", "system.posix_acl_default", acl((1, 7, ANY), (2, 7, 1000), (4, 5, ANY), (16, 7, ANY), (32, 0, ANY)))
    os.umask(0o077)
    put("d/f")
    os.mkdir("d/e")
    os.umask(0)
    same(mode("d/f"), 0o660)
    same(mode("d/e"), 0o770)
    same(os.getxattr("d/e", "system.posix_acl_default") != b"", True)
    as_user(1000, lambda: put("d/e/new"))


@case
def acl_default_on_file_refused():
    put("f")
    value = acl((1, 7, ANY), (4, 5, ANY), (32, 0, ANY))
    fails(errno.EACCES, os.setxattr, "f", "system.posix_acl_default", value)


# Locks and memory


def in_child(work):
    """Whether work succeeds in another process."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001: the status says it
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@case
def flock_excludes_and_ends_with_the_descriptor():
    put("f")
    first = open("f", "r+b")
    fcntl.flock(first, fcntl.LOCK_EX)
    other = lambda kind: lambda: fcntl.flock(open("f", "rb"), kind | fcntl.LOCK_NB)  # noqa: E731
    same(in_child(other(fcntl.LOCK_SH)), False)
    fcntl.flock(first, fcntl.LOCK_SH)
    same(in_child(other(fcntl.LOCK_SH)), True)
    same(in_child(other(fcntl.LOCK_EX)), False)
    first.close()
    same(in_child(other(fcntl.LOCK_EX)), True)


@case
def posix_locks_of_ranges():
    put("f", b"0" * 100)
    with open("f", "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)

        def lock(start, kind):
            with open("f", "r+b") as theirs:
                fcntl.lockf(theirs, kind | fcntl.LOCK_NB, 10, start)

        same(in_child(lambda: lock(5, fcntl.LOCK_SH)), False)
        same(in_child(lambda: lock(10, fcntl.LOCK_EX)), True)
        fcntl.lockf(file, fcntl.LOCK_UN, 5, 5)
        same(in_child(lambda: lock(5, fcntl.LOCK_SH)), True)


@case
def open_file_description_locks():
    put("f", b"0" * 10)
    first, second = open("f", "r+b"), open("f", "r+b")
    lock = lambda kind: struct.pack("hhqqi4x", kind, 0, 0, 0, 0)  # noqa: E731
    fcntl.fcntl(first, 37, lock(fcntl.F_WRLCK))
    fails(errno.EAGAIN, fcntl.fcntl, second, 37, lock(fcntl.F_WRLCK))
    first.close()
    fcntl.fcntl(second, 37, lock(fcntl.F_WRLCK))


@case
def mmap_shared_is_seen_by_another_process():
    put("f", b"\0" * 4096)
    with open("f", "r+b") as file:
        memory = mmap.mmap(file.fileno(), 4096)

        def change():
            with open("f", "r+b") as theirs:
                mmap.mmap(theirs.fileno(), 4096)[0:5] = b"child"

        same(in_child(change), True)
        same(memory[0:5], b"child")
        memory[5:6] = b"!"
        memory.flush()
    same(get("f")[:6], b"child!")


@case
def mmap_and_write_are_one():
    put("f", b"a" * 8192)
    with open("f", "r+b", 0) as file:
        memory = mmap.mmap(file.fileno(), 8192)
        os.pwrite(file.fileno(), b"write", 4096)
        same(memory[4096:4101], b"write")
        memory[0:4] = b"mmap"
        same(os.pread(file.fileno(), 4, 0), b"mmap")


@case
def mmap_private_stays_private():
    put("f", b"a" * 10)
    with open("f", "rb") as file:
        memory = mmap.mmap(file.fileno(), 10, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        memory[0:1] = b"b"
    same(get("f"), b"a" * 10)


@case
def mmap_of_a_removed_file():
    put("f", b"a" * 4096)
    with open("f", "r+b") as file:
        memory = mmap.mmap(file.fileno(), 4096)
        os.unlink("f")
    memory[0:1] = b"b"
    same(memory[0:2], b"ba")


# Ways of opening and writing


@case
def o_direct():
    fd = os.open("f", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    memory = mmap.mmap(-1, 8192)
    memory[0:4] = b"data"
    same(os.writev(fd, [memory]), 8192)
    os.lseek(fd, 0, 0)
    back = mmap.mmap(-1, 8192)
    same(os.readv(fd, [back]), 8192)
    same(back[0:4], b"data")
    os.close(fd)
    same(os.stat("f").st_size, 8192)


@case
def o_append_of_two_processes_loses_nothing():
    put("f")

    def append(letter):
        fd = os.open("f", os.O_WRONLY | os.O_APPEND)
        for _ in range(200):
            os.write(fd, letter * 10)
        os.close(fd)

    child = os.fork()
    if child == 0:
        append(b"b")
        os._exit(0)
    append(b"a")
    os.waitpid(child, 0)
    content = get("f")
    same((content.count(b"a"), content.count(b"b")), (2000, 2000))


@case
def o_tmpfile_and_link():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"late")
    same(os.listdir("."), [])
    system("linkat", AT_FDCWD, f"/proc/self/fd/{fd}", AT_FDCWD, "f", 0x400)
    os.close(fd)
    same((get("f"), mode("f")), (b"late", 0o640))


@case
def o_excl_and_o_trunc():
    put("f", b"content")
    fails(errno.EEXIST, os.open, "f", os.O_CREAT | os.O_EXCL)
    os.close(os.open("f", os.O_WRONLY | os.O_TRUNC))
    same(get("f"), b"")


@case
def o_nofollow_and_o_directory():
    put("f")
    os.symlink("f", "l")
    fails(errno.ELOOP, os.open, "l", os.O_NOFOLLOW)
    fails(errno.ENOTDIR, os.open, "f", os.O_DIRECTORY)
    fails(errno.EISDIR, os.open, ".", os.O_WRONLY)


@case
def o_path_then_fstat_and_reopen():
    put("f", b"x")
    fd = os.open("f", os.O_PATH)
    fails(errno.EBADF, os.read, fd, 1)
    same(os.fstat(fd).st_size, 1)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    same(os.read(again, 1), b"x")
    os.close(fd)
    os.close(again)


@case
def removed_file_stays_while_open():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"still")
    os.unlink("f")
    same(os.fstat(fd).st_nlink, 0)
    same(os.pread(fd, 5, 0), b"still")
    os.ftruncate(fd, 2)
    os.fchmod(fd, 0o600)
    same((os.fstat(fd).st_size, stat.S_IMODE(os.fstat(fd).st_mode)), (2, 0o600))
    os.close(fd)


@case
def removed_file_stays_while_overwritten():
    put("f", b"old")
    put("g", b"new")
    with open("f", "rb") as file:
        os.rename("g", "f")
        same(file.read(), b"old")
    same(get("f"), b"new")


@case
def removed_directory_is_empty():
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    os.rmdir("d")
    same(os.listdir(fd), [])
    fails(errno.ENOENT, os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    os.close(fd)


@case
def vectored_and_positioned_io():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    same(os.pwritev(fd, [b"ab", b"cd"], 2), 4)
    first, second = bytearray(3), bytearray(3)
    same(os.preadv(fd, [first, second], 0), 6)
    same((bytes(first), bytes(second)), (b"\0\0a", b"bcd"))
    os.close(fd)


@case
def write_beyond_the_end_leaves_zeros():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"x", 10000)
    same(os.pread(fd, 10000, 0), b"\0" * 10000)
    os.close(fd)


@case
def truncate_up_and_down():
    put("f", b"abc")
    os.truncate("f", 5)
    same(get("f"), b"abc\0\0")
    os.truncate("f", 1)
    os.truncate("f", 3)
    same(get("f"), b"a\0\0")


@case
def truncate_of_a_text_that_runs_is_refused():
    put("f", get("/bin/sleep"))
    os.chmod("f", 0o755)
    child = os.fork()
    if child == 0:
        os.execv("./f", ["f", "100"])
    for _ in range(100):
        if b"f\0" == open(f"/proc/{child}/cmdline", "rb").read()[:2]:
            break
        time.sleep(0.02)
    try:
        fails(errno.ETXTBSY, os.open, "f", os.O_WRONLY)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@case
def sendfile_and_splice():
    put("f", b"x" * 100000)
    source, target = os.open("f", os.O_RDONLY), os.open("g", os.O_CREAT | os.O_WRONLY)
    same(os.sendfile(target, source, 0, 100000), 100000)
    os.close(target)
    same(os.stat("g").st_size, 100000)
    reader, writer = os.pipe()
    same(os.splice(source, writer, 100, 0), 100)
    same(os.read(reader, 100), b"x" * 100)
    for fd in (source, reader, writer):
        os.close(fd)


@case
def copy_file_range():
    put("f", b"0123456789")
    source, target = os.open("f", os.O_RDONLY), os.open("g", os.O_CREAT | os.O_RDWR)
    same(os.copy_file_range(source, target, 5, 2, 1), 5)
    same(os.pread(target, 10, 0), b"\x0023456")
    os.close(source)
    os.close(target)


@case
def fsync_and_its_relatives():
    fd = os.open("f", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"x")
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    fd = os.open(".", os.O_RDONLY)
    os.fsync(fd)
    system("syncfs", fd)
    os.close(fd)


@case
def fadvise():
    put("f", b"x")
    fd = os.open("f", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


# Space


@case
def fallocate_grows():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    fallocate(fd, 0, 0, 65536)
    same(os.fstat(fd).st_size, 65536)
    same(os.fstat(fd).st_blocks >= 128, True, "blocks")
    fallocate(fd, KEEP_SIZE, 0, 131072)
    same(os.fstat(fd).st_size, 65536)
    os.close(fd)


@case
def fallocate_punches_holes():
    put("f", b"x" * 65536)
    fd = os.open("f", os.O_RDWR)
    os.fsync(fd)
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 8192, 16384)
    same(os.pread(fd, 16384, 8192), b"\0" * 16384)
    same(os.pread(fd, 1, 8191), b"x")
    same(os.fstat(fd).st_size, 65536)
    os.close(fd)


@case
def fallocate_zeroes():
    put("f", b"x" * 16384)
    fd = os.open("f", os.O_RDWR)
    fallocate(fd, ZERO_RANGE, 0, 4096)
    same(os.pread(fd, 4097, 0), b"\0" * 4096 + b"x")
    os.close(fd)


@case
def seek_data_and_hole():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 1 << 20)
    os.pwrite(fd, b"x" * 4096, 512 * 1024)
    os.fsync(fd)
    same(os.lseek(fd, 0, os.SEEK_DATA), 512 * 1024, "data")
    same(os.lseek(fd, 512 * 1024, os.SEEK_HOLE), 516 * 1024, "hole")
    fails(errno.ENXIO, os.lseek, fd, 1 << 20, os.SEEK_DATA)
    os.close(fd)


@case
def sparse_file_of_5_gib():
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"end", 5 << 30)
    same(os.fstat(fd).st_size, (5 << 30) + 3)
    same(os.fstat(fd).st_blocks < 1024, True, "blocks")
    same(os.pread(fd, 3, 5 << 30), b"end")
    same(os.pread(fd, 3, 4 << 30), b"\0\0\0")
    os.close(fd)


@case
def statvfs():
    found = os.statvfs(".")
    same(found.f_namemax, 255)
    same(found.f_blocks > 0 and found.f_bavail <= found.f_bfree <= found.f_blocks, True)


# Names and directories


@case
def names_with_odd_bytes():
    names = [b"new\nline", b"sp ace", b"\xff\xfe", b"-dash", b"quote'\"", b"\x01", "ümläut".encode(), b"..x", b"x" * 255]
    for name in names:
        put(name, name)
    same(sorted(os.listdir(b".")), sorted(names))
    for name in names:
        same(get(name), name)


@case
def name_of_256_bytes_refused():
    fails(errno.ENAMETOOLONG, put, "x" * 256)
    fails(errno.ENAMETOOLONG, os.stat, "x" * 256)


@case
def symlink_of_4095_bytes():
    os.symlink("x" * 4095, "l")
    same(os.readlink("l"), "x" * 4095)
    same(os.lstat("l").st_size, 4095)
    fails(errno.ENAMETOOLONG, os.symlink, "x" * 4096, "m")


@case
def a_thousand_entries():
    os.mkdir("d")
    for number in range(1000):
        os.close(os.open(f"d/{number}", os.O_CREAT | os.O_WRONLY))
    same(len(os.listdir("d")), 1000)
    same(len({entry.inode() for entry in os.scandir("d")}), 1000)
    seen = set()
    for entry in os.scandir("d"):
        seen.add(entry.name)
        os.unlink(entry.path)
    same((len(seen), os.listdir("d")), (1000, []))
    os.rmdir("d")


@case
def listing_while_others_come_and_go():
    os.mkdir("d")
    for number in range(300):
        put(f"d/stay{number}")
    child = os.fork()
    if child == 0:
        for number in range(100):
            put(f"d/come{number}")
            os.unlink(f"d/come{number}")
        os._exit(0)
    for _ in range(5):
        names = os.listdir("d")
        same(len([name for name in names if name.startswith("stay")]), 300)
        same(len(names), len(set(names)), "doubled names")
    os.waitpid(child, 0)


@case
def directory_entries_have_types_and_inodes():
    put("f")
    os.mkdir("d")
    os.symlink("f", "l")
    os.mkfifo("p")
    for entry in os.scandir("."):
        same(entry.inode(), os.lstat(entry.name).st_ino, entry.name)
    kinds = {entry.name: (entry.is_file(follow_symlinks=False), entry.is_dir(), entry.is_symlink()) for entry in os.scandir(".")}
    same(kinds, {"f": (True, False, False), "d": (False, True, False), "l": (False, False, True), "p": (False, False, False)})


@case
def directory_link_counts():
    os.mkdir("d")
    before = os.stat("d").st_nlink
    os.mkdir("d/e")
    same(os.stat("d").st_nlink in (before + 1, 1), True)
    fails(errno.ENOTEMPTY, os.rmdir, "d")
    os.rmdir("d/e")
    same(os.stat("d").st_nlink, before)


@case
def getcwd_after_rename():
    os.makedirs("a/b")
    here = os.getcwd()
    os.chdir("a/b")
    os.rename("../../a", "../../c")
    same(os.getcwd(), here + "/c/b")
    os.chdir(here)


@case
def rename_replaces():
    put("f", b"f")
    put("g", b"g")
    os.rename("f", "g")
    same((os.listdir("."), get("g")), (["g"], b"f"))
    os.mkdir("d")
    fails(errno.EISDIR, os.rename, "g", "d")
    fails(errno.ENOTDIR, os.rename, "d", "g")
    os.makedirs("e/f")
    fails(errno.ENOTEMPTY, os.rename, "d", "e")
    fails(errno.EINVAL, os.rename, "e", "e/f/g")


@case
def rename_noreplace():
    put("f", b"f")
    put("g", b"g")
    fails(errno.EEXIST, rename, "f", "g", NOREPLACE)
    rename("f", "h", NOREPLACE)
    same(get("h"), b"f")


@case
def rename_exchange():
    put("f", b"f")
    os.mkdir("d")
    rename("f", "d", EXCHANGE)
    same((os.path.isdir("f"), get("d")), (True, b"f"))
    fails(errno.ENOENT, rename, "f", "nothing", EXCHANGE)


@case
def rename_of_hard_links_does_nothing():
    put("f")
    os.link("f", "g")
    os.rename("f", "g")
    same(sorted(os.listdir(".")), ["f", "g"])


@case
def hard_links():
    put("f", b"one")
    os.link("f", "g")
    same((os.stat("f").st_nlink, os.stat("f").st_ino), (2, os.stat("g").st_ino))
    with open("g", "ab") as file:
        file.write(b" two")
    same(get("f"), b"one two")
    os.unlink("f")
    same((get("g"), os.stat("g").st_nlink), (b"one two", 1))
    os.mkdir("d")
    fails(errno.EPERM, os.link, "d", "e")


@case
def hard_links_of_links_and_fifos():
    os.symlink("nowhere", "l")
    os.mkfifo("p")
    os.link("l", "l2", follow_symlinks=False)
    os.link("p", "p2")
    same(os.readlink("l2"), "nowhere")
    same(os.stat("p").st_nlink, 2)


# Kinds of files


@case
def fifo_carries_between_processes():
    os.mkfifo("p", 0o600)
    child = os.fork()
    if child == 0:
        with open("p", "wb") as file:
            file.write(b"through")
        os._exit(0)
    same(get("p"), b"through")
    os.waitpid(child, 0)


@case
def socket_carries_between_processes():
    server = socket.socket(socket.AF_UNIX)
    server.bind("s")
    server.listen()
    same(stat.S_ISSOCK(os.stat("s").st_mode), True)
    client = socket.socket(socket.AF_UNIX)
    client.connect("s")
    client.send(b"x")
    same(server.accept()[0].recv(1), b"x")
    os.unlink("s")


@case
def device_node():
    os.mknod("null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    found = os.stat("null")
    same((stat.S_ISCHR(found.st_mode), found.st_rdev), (True, os.makedev(1, 3)))
    os.mknod("whiteout", stat.S_IFCHR, os.makedev(0, 0))


# Owners, modes, times


@case
def umask_counts():
    os.umask(0o027)
    put("f")
    os.mkdir("d")
    os.umask(0)
    same((mode("f"), mode("d")), (0o640, 0o750))


@case
def files_belong_to_their_maker():
    os.mkdir("d")
    os.chmod("d", 0o777)
    as_user(1000, lambda: (put("d/f"), os.mkdir("d/e"), os.symlink("x", "d/l"), os.mkfifo("d/p")))
    for name in ("f", "e", "l", "p"):
        found = os.lstat(f"d/{name}")
        same((found.st_uid, found.st_gid), (1000, 1000), name)


@case
def supplementary_groups_count():
    os.mkdir("d")
    os.chown("d", 0, 77)
    os.chmod("d", 0o770)
    as_user(1000, lambda: fails(errno.EACCES, put, "d/f"))
    as_user(1000, lambda: put("d/f"), groups=[77])


@case
def permissions_are_checked():
    put("f", b"x")
    os.chmod("f", 0o604)
    as_user(1000, lambda: (same(get("f"), b"x"), fails(errno.EACCES, open, "f", "ab")))
    as_user(1000, lambda: fails(errno.EPERM, os.chmod, "f", 0o777))
    as_user(1000, lambda: fails(errno.EPERM, os.chown, "f", 1000, 1000))


@case
def sticky_directory():
    os.mkdir("d")
    os.chmod("d", 0o1777)
    as_user(1000, lambda: put("d/f"))
    as_user(1001, lambda: (fails(errno.EPERM, os.unlink, "d/f"), fails(errno.EPERM, os.rename, "d/f", "d/g")))
    as_user(1000, lambda: os.unlink("d/f"))


@case
def setgid_directory_gives_its_group():
    os.mkdir("d")
    os.chown("d", 0, 77)
    os.chmod("d", 0o2777)
    as_user(1000, lambda: (put("d/f"), os.mkdir("d/e")))
    same(os.stat("d/f").st_gid, 77)
    same((os.stat("d/e").st_gid, mode("d/e") & 0o2000), (77, 0o2000))


@case
def setgid_of_a_foreign_group_is_not_given():
    put("f")
    os.chown("f", 1000, 77)
    as_user(1000, lambda: os.chmod("f", 0o2755))
    same(mode("f"), 0o755)


@case
def setuid_is_lost_on_write():
    put("f", b"x")
    os.chmod("f", 0o6777)
    as_user(1000, lambda: open("f", "ab").write(b"y"))
    same(mode("f"), 0o777)


@case
def setuid_is_lost_on_truncate():
    put("f", b"x")
    os.chmod("f", 0o6777)
    as_user(1000, lambda: os.truncate("f", 0))
    same(mode("f"), 0o777)


@case
def setuid_is_lost_on_mmap_write_after_write():
    put("f", b"x" * 4096)
    os.chmod("f", 0o4777)

    def change():
        with open("f", "r+b", 0) as file:
            file.write(b"y")
            mmap.mmap(file.fileno(), 4096)[1:2] = b"z"

    as_user(1000, change)
    same(mode("f"), 0o777)


@case
def setuid_is_kept_by_root():
    put("f", b"x")
    os.chmod("f", 0o4777)
    with open("f", "ab") as file:
        file.write(b"y")
    same(mode("f") & 0o777, 0o777)


@case
def setuid_is_lost_on_chown():
    put("f")
    os.chmod("f", 0o6755)
    os.chown("f", 5, 5)
    same(mode("f"), 0o755)


@case
def chown_of_links_and_ids_left_alone():
    os.symlink("nothing", "l")
    os.chown("l", 5, 6, follow_symlinks=False)
    same((os.lstat("l").st_uid, os.lstat("l").st_gid), (5, 6))
    put("f")
    os.chown("f", 5, -1)
    os.chown("f", -1, 6)
    same((os.stat("f").st_uid, os.stat("f").st_gid), (5, 6))


@case
def times_are_set_to_the_nanosecond():
    put("f")
    os.utime("f", ns=(1_000_000_001, 2_000_000_002))
    found = os.stat("f")
    same((found.st_atime_ns, found.st_mtime_ns), (1_000_000_001, 2_000_000_002))


def utimensat(path, atime, mtime, flags=0):
    times = struct.pack("qqqq", *atime, *mtime)
    return system("utimensat", AT_FDCWD, path, times, flags)


NOW, OMIT = (0, (1 << 30) - 1), (0, (1 << 30) - 2)


@case
def times_now_and_left_alone():
    put("f")
    os.utime("f", ns=(1, 2))
    utimensat("f", OMIT, NOW)
    found = os.stat("f")
    same(found.st_atime_ns, 1)
    same(abs(found.st_mtime - time.time()) < 60, True, "now")
    utimensat("f", (7, 8), OMIT)
    same(os.stat("f").st_atime_ns, 7_000_000_008)


@case
def times_of_a_link_itself():
    os.symlink("x", "l")
    utimensat("l", (5, 0), (6, 0), 0x100)
    same((os.lstat("l").st_atime, os.lstat("l").st_mtime), (5, 6))


@case
def times_before_1970_and_after_2038():
    put("f")
    os.utime("f", (-1, 2**32))
    same((os.stat("f").st_atime, os.stat("f").st_mtime), (-1, 2**32))


@case
def writing_changes_times():
    put("f", b"x")
    os.utime("f", ns=(0, 0))
    with open("f", "ab") as file:
        file.write(b"y")
    same(os.stat("f").st_mtime > 1, True, "mtime")
    os.utime(".", ns=(0, 0))
    put("g")
    same(os.stat(".").st_mtime > 1, True, "mtime of the directory")


@case
def chmod_changes_ctime_only():
    put("f")
    before = os.stat("f")
    time.sleep(0.02)
    os.chmod("f", 0o600)
    after = os.stat("f")
    same(after.st_mtime_ns, before.st_mtime_ns)
    same(after.st_ctime_ns > before.st_ctime_ns, True)


@case
def access_asks_for_the_real_user():
    put("f")
    os.chmod("f", 0o600)
    as_user(1000, lambda: (same(os.access("f", os.R_OK), False), same(os.access("f", os.F_OK), True)))
    same(os.access("f", os.R_OK | os.W_OK), True)
    same(os.access("f", os.X_OK), False)


# Files of the image: what is changed of them is copied from a read-only layer first


@case
def image_file_is_written():
    path = "/etc/pam.d/login"
    before, old = os.stat(path), get(path)
    with open(path, "ab") as file:
        file.write(b"# more")
    after = os.stat(path)
    same(get(path), old + b"# more")
    same((after.st_mode, after.st_uid, after.st_gid), (before.st_mode, before.st_uid, before.st_gid))


@case
def image_file_gets_owner_times_and_attributes():
    path = "/etc/pam.d/other"
    old = get(path)
    os.chmod(path, 0o640)
    os.chown(path, 7, 8)
    os.setxattr(path, "user.a", b"1")
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    found = os.stat(path)
    same((mode(path), found.st_uid, found.st_gid, found.st_mtime_ns), (0o640, 7, 8, 2_000_000_002))
    same((os.getxattr(path, "user.a"), get(path)), (b"1", old))


@case
def image_file_is_mapped_and_written():
    path = "/etc/skel/.bashrc"
    old = get(path)
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), len(old))
        memory[0:3] = b"new"
        memory.flush()
    same(get(path), b"new" + old[3:])


@case
def image_file_is_linked_and_renamed():
    old = get("/etc/skel/.profile")
    os.link("/etc/skel/.profile", "/etc/skel/link")
    os.rename("/etc/skel/.profile", "/etc/skel/renamed")
    with open("/etc/skel/link", "ab") as file:
        file.write(b"# more")
    same(get("/etc/skel/renamed"), old + b"# more")
    same(os.stat("/etc/skel/link").st_ino, os.stat("/etc/skel/renamed").st_ino)
    same(".profile" in os.listdir("/etc/skel"), False)


@case
def image_directory_lists_what_came_and_went():
    names = set(os.listdir("/etc/pam.d"))
    os.unlink("/etc/pam.d/su")
    os.unlink("/etc/pam.d/su-l")
    put("/etc/pam.d/su-l", b"anew")
    put("/etc/pam.d/new")
    entries = list(os.scandir("/etc/pam.d"))
    same(sorted(entry.name for entry in entries), sorted(names - {"su"} | {"new"}))
    same([entry.name for entry in entries if not entry.is_file() or entry.inode() != os.stat(entry.path).st_ino], [])
    fails(errno.ENOENT, os.stat, "/etc/pam.d/su")
    same(get("/etc/pam.d/su-l"), b"anew")


@case
def image_directory_is_removed_and_made_anew():
    shutil.rmtree("/usr/share/debconf")
    same(os.path.exists("/usr/share/debconf"), False)
    os.mkdir("/usr/share/debconf")
    same(os.listdir("/usr/share/debconf"), [])
    put("/usr/share/debconf/frontend", b"anew")
    same((os.listdir("/usr/share/debconf"), get("/usr/share/debconf/frontend")), (["frontend"], b"anew"))


@case
def image_directory_is_moved():
    files = lambda top: sorted(os.path.relpath(os.path.join(at, name), top) for at, _, names in os.walk(top) for name in names)  # noqa: E731
    before = files("/etc/apt")
    shutil.move("/etc/apt", "/etc/moved")
    same((files("/etc/moved"), os.path.exists("/etc/apt")), (before, False))
    same(before != [], True)


# News of changes


@case
def inotify_of_own_changes():
    fd = libc.inotify_init()
    os.mkdir("d")
    same(libc.inotify_add_watch(fd, b"d", 0x100 | 0x200 | 0x80 | 0x40 | 0x8) > 0, True)
    put("d/f", b"x")
    os.rename("d/f", "d/g")
    os.unlink("d/g")
    same(select.select([fd], [], [], 5)[0], [fd])
    events = os.read(fd, 65536)
    masks = []
    while events:
        _wd, mask, _cookie, length = struct.unpack("iIII", events[:16])
        masks.append(mask)
        events = events[16 + length :]
    os.close(fd)
    same(masks, [0x100, 0x8, 0x40, 0x80, 0x200])


# Limits of the file system below


def small(directory):
    path = os.path.join(directory, "fill")
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)

    def fill():
        for _ in range(1024):
            os.write(fd, b"x" * 65536)
        os.fsync(fd)

    fails(errno.ENOSPC, fill)
    os.close(fd)
    os.unlink(path)
    put(path, b"again")
    same(get(path), b"again")
    os.unlink(path)


def read_only(directory):
    path = os.path.join(directory, "file")
    fails(errno.EROFS, put, path)
    fails(errno.EROFS, os.mkdir, path)
    fails(errno.EROFS, os.chmod, directory, 0o700)
    fails(errno.EROFS, os.utime, directory)


def run(name, work):
    try:
        work()
        print(f"ok {name}", flush=True)
    except BaseException as error:  # noqa: BLE001: every failure is a line
        print(f"FAIL {name}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)


def main():
    part, parts = map(int, sys.argv[1].split("/"))
    top, full, unwritable = sys.argv[2:5]
    os.umask(0)
    os.chmod(top, 0o755)
    for function in CASES[part - 1 :: parts]:
        directory = os.path.join(top, function.__name__)
        os.mkdir(directory)
        os.chdir(directory)
        run(function.__name__, function)
        os.umask(0)
        os.chdir("/")
    if part == parts:
        run("no_space_is_told", lambda: small(full))
        run("a_read_only_file_system_is_told", lambda: read_only(unwritable))


main()
