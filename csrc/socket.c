/* The only place that knows a socket: PF_KEY's number, and many messages in one call. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE	/* sendmmsg, recvmmsg; glibc declares them under nothing less */
#endif

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/types.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "pfk.h"

#define BATCH 64

int pfk_pf_key(void)
{
#ifdef PF_KEY
	return PF_KEY;
#else
	return -1;
#endif
}

#ifdef __linux__

static int send_batch(int fd, const uint8_t *arena, const uint32_t *lengths, int count)
{
	struct mmsghdr messages[BATCH];
	struct iovec vectors[BATCH];

	memset(messages, 0, sizeof messages);
	for (int i = 0; i < count; i++) {
		vectors[i].iov_base = (void *)(uintptr_t)arena;
		vectors[i].iov_len = lengths[i];
		messages[i].msg_hdr.msg_iov = &vectors[i];
		messages[i].msg_hdr.msg_iovlen = 1;
		arena += lengths[i];
	}
	return sendmmsg(fd, messages, (unsigned)count, 0);
}

static int receive_batch(int fd, uint8_t *arena, uint32_t size, uint32_t *lengths, int count)
{
	struct mmsghdr messages[BATCH];
	struct iovec vectors[BATCH];
	int received;

	memset(messages, 0, sizeof messages);
	for (int i = 0; i < count; i++) {
		vectors[i].iov_base = arena + (size_t)i * size;
		vectors[i].iov_len = size;
		messages[i].msg_hdr.msg_iov = &vectors[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	/* af_key refuses flags it does not know, so the length of a cut message is asked for by MSG_TRUNC alone. */
	received = recvmmsg(fd, messages, (unsigned)count, MSG_DONTWAIT | MSG_TRUNC, NULL);
	for (int i = 0; i < received; i++)
		lengths[i] = messages[i].msg_len;
	return received;
}

#else

static int send_batch(int fd, const uint8_t *arena, const uint32_t *lengths, int count)
{
	/* One at a time: what failed behind others would be sent again, and FreeBSD may have done it (ENOBUFS). */
	(void)count;
	return send(fd, arena, lengths[0], 0) < 0 ? -1 : 1;
}

static int receive_one(int fd, uint8_t *buffer, uint32_t size, uint32_t *length)
{
	struct iovec vector = { buffer, size };
	struct msghdr message;
	ssize_t received;

	memset(&message, 0, sizeof message);
	message.msg_iov = &vector;
	message.msg_iovlen = 1;
	received = recvmsg(fd, &message, MSG_DONTWAIT);
	if (received < 0)
		return -1;
	*length = message.msg_flags & MSG_TRUNC ? size + 1 : (uint32_t)received;
	return 0;
}

static int receive_batch(int fd, uint8_t *arena, uint32_t size, uint32_t *lengths, int count)
{
	for (int i = 0; i < count; i++)
		if (receive_one(fd, arena + (size_t)i * size, size, &lengths[i]))
			return i ? i : -1;
	return count;
}

#endif

int pfk_send_many(int fd, const uint8_t *arena, const uint32_t *lengths, int count, int *error)
{
	int done = 0;

	*error = 0;
	while (done < count) {
		int batch = count - done < BATCH ? count - done : BATCH;
		int sent = send_batch(fd, arena, lengths + done, batch);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent <= 0) {
			*error = errno;
			break;
		}
		while (sent--)
			arena += lengths[done++];
	}
	return done;
}

/* Move what lies in slots of `size` bytes together, drop what was cut, and leave no second copy behind: it may be a key. */
static void close_up(uint8_t *arena, uint32_t size, uint32_t *lengths, int count)
{
	size_t end = 0;

	for (int i = 0; i < count; i++) {
		uint8_t *slot = arena + (size_t)i * size;
		size_t used = lengths[i] <= size ? lengths[i] : size;

		if (lengths[i] <= size) {
			memmove(arena + end, slot, used);
			end += used;
		}
		if (slot + used > arena + end) {
			uint8_t *rest = slot > arena + end ? slot : arena + end;

			pfk_wipe(rest, (size_t)(slot + used - rest));
		}
	}
}

int pfk_receive_many(int fd, uint8_t *arena, uint32_t size, uint32_t *lengths, int count, int timeout, int *error)
{
	struct pollfd wait = { fd, POLLIN, 0 };
	int done = 0, ready = poll(&wait, 1, timeout);

	*error = 0;
	if (ready <= 0) {
		*error = ready < 0 ? errno : 0;
		return ready;
	}
	while (done < count) {
		int batch = count - done < BATCH ? count - done : BATCH;
		int received = receive_batch(fd, arena + (size_t)done * size, size, lengths + done, batch);

		if (received < 0 && errno != EAGAIN && errno != EWOULDBLOCK && done == 0) {
			*error = errno;
			return -1;
		}
		if (received <= 0)
			break;
		done += received;
		if (received < batch)
			break;
	}
	close_up(arena, size, lengths, done);
	return done;
}
