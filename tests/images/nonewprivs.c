/*
 * The program of the image nonewprivs: prints the effective user id, as a set-user-id file of root that the
 * CRI conformance suite runs as another user. Without a C library, as pause.c.
 */
enum { SYS_write = 1, SYS_exit = 60, SYS_geteuid = 107 };

static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

void _start(void)
{
    char text[] = "Effective uid: 0123456789\n";
    char *digits = text + 15, *end = digits, reversed[10];
    unsigned long id = call(SYS_geteuid, 0, 0, 0), count = 0;
    do
        reversed[count++] = '0' + id % 10;
    while (id /= 10);
    while (count)
        *end++ = reversed[--count];
    *end++ = '\n';
    call(SYS_write, 1, (long)text, end - text);
    call(SYS_exit, 0, 0, 0);
}
