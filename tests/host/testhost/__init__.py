"""The kata-rs test host: a Debian with containerd and a usable /dev/kvm, inside QEMU.

Modules, from the bottom up:

* ``errors``  - the one exception type; every instance says what to do about it
* ``cache``   - build stages that are keyed by their inputs
* ``debian``  - packages on this machine, and the mirror it uses
* ``qemu``    - which QEMU, which accelerator, its arguments, its control socket
* ``channel`` - running a command in a host, and the streams around it
* ``machine`` - one host: boot, restore, save, copy files in, stop
* ``build``   - the stages that end in a saved state
* ``cli``     - the commands ``build``, ``up``, ``down``, ``status``, ``install`` and ``run``
"""
