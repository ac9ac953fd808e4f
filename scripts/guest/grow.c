// Makes the first partition of a disk, and the mounted ext4 file system in it, as large as the disk: an image is
// copied to a volume that may be larger than it. Does nothing when there is nothing to gain.
//
// In this order: the kernel's idea of the partition, the partition table, the file system. A crash between two steps
// leaves something valid that the next start completes: ext4 resizes itself under its own journal.
// Usage: grow DISK MOUNTPOINT

#include <errno.h>
#include <fcntl.h>
#include <linux/blkpg.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include <unistd.h>

#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t)

static int fail(const char *what) {
    printf("grow: %s: %s\n", what, strerror(errno));
    return 1;
}

int main(int count, char **argument) {
    if (count != 3) return fail("usage: grow DISK MOUNTPOINT");
    int disk = open(argument[1], O_RDWR | O_CLOEXEC);
    if (disk < 0) return fail(argument[1]);
    uint64_t disk_bytes;
    if (ioctl(disk, BLKGETSIZE64, &disk_bytes) < 0) return fail("size of the disk");
    unsigned char sector[512];
    if (pread(disk, sector, sizeof sector, 0) != sizeof sector) return fail("read the partition table");
    uint32_t start, sectors;
    memcpy(&start, sector + 454, 4);
    memcpy(&sectors, sector + 458, 4);

    // Whole MiB; a partition table of this kind ends at 2 TiB.
    uint64_t wanted = (disk_bytes >> 20 << 11) - start;
    if (wanted > UINT32_MAX) wanted = UINT32_MAX >> 11 << 11;
    if (wanted > sectors) {
        struct blkpg_partition partition = { .pno = 1, .start = (int64_t)start << 9, .length = (int64_t)wanted << 9 };
        struct blkpg_ioctl_arg order = { .op = BLKPG_RESIZE_PARTITION, .datalen = sizeof partition, .data = &partition };
        if (ioctl(disk, BLKPG, &order) < 0) return fail("resize the partition");
        sectors = wanted;
        memcpy(sector + 458, &sectors, 4);
        if (pwrite(disk, sector, sizeof sector, 0) != sizeof sector || fsync(disk) < 0)
            return fail("write the partition table");
    }

    int root = open(argument[2], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct statfs status;
    if (root < 0 || fstatfs(root, &status) < 0) return fail(argument[2]);
    uint64_t blocks = ((uint64_t)sectors << 9) / status.f_bsize;
    if (ioctl(root, EXT4_IOC_RESIZE_FS, &blocks) < 0) return fail("resize the file system");
    return 0;
}
