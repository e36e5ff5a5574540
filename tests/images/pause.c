/*
 * The pause image's only program: PID 1 of a pod that holds namespaces open, reaps what is left to it,
 * and ends on SIGTERM or SIGINT. Without a C library, so that the image is a few kilobytes.
 */
typedef unsigned long word;

enum { SYS_rt_sigprocmask = 14, SYS_exit = 60, SYS_wait4 = 61, SYS_rt_sigtimedwait = 128 };
enum { SIG_BLOCK = 0, SIGINT = 2, SIGTERM = 15, SIGCHLD = 17, WNOHANG = 1 };

static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return result;
}

void _start(void)
{
    /* Blocked signals wait for rt_sigtimedwait; PID 1 would never get them by default action. */
    word set = 1UL << (SIGINT - 1) | 1UL << (SIGTERM - 1) | 1UL << (SIGCHLD - 1);
    call(SYS_rt_sigprocmask, SIG_BLOCK, (long)&set, 0, sizeof set);
    for (;;) {
        long signal = call(SYS_rt_sigtimedwait, (long)&set, 0, 0, sizeof set);
        if (signal == SIGINT || signal == SIGTERM)
            call(SYS_exit, 0, 0, 0, 0);
        while (call(SYS_wait4, -1, 0, WNOHANG, 0) > 0)
            ;
    }
}
