/* A disk of stated slowness: every fsync and fdatasync takes FSYNC_DELAY_US microseconds longer. For LD_PRELOAD:
 * `cc -shared -fPIC -o slow_fsync.so slow_fsync.c -ldl` (bench/custody.py does it). */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <time.h>

static int slowly(const char *name, int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *text = getenv("FSYNC_DELAY_US");
    long delay = text ? atol(text) : 0;
    struct timespec left = {delay / 1000000, delay % 1000000 * 1000};
    int result = real(fd), error = errno;

    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ; /* a signal must not make the disk faster */
    errno = error;
    return result;
}

int fsync(int fd) { return slowly("fsync", fd); }
int fdatasync(int fd) { return slowly("fdatasync", fd); }
