/*
 * Every mutation of every file named: each byte with each of 256 values, each 16-bit length with each of 65536, each
 * truncation.  Linked with one fuzz target, run under the sanitizers; the message is copied to a buffer of its own size,
 * so that a read past its end is seen.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned long long runs;

static void try(const uint8_t *data, size_t size)
{
	LLVMFuzzerTestOneInput(data, size);
	runs++;
}

static void truncate_everywhere(const uint8_t *data, size_t size)
{
	for (size_t length = 0; length < size; length++) {
		uint8_t *copy = malloc(length ? length : 1);

		if (!copy)
			abort();
		memcpy(copy, data, length);
		try(copy, length);
		free(copy);
	}
}

static void change_every_byte(uint8_t *data, size_t size)
{
	for (size_t at = 0; at < size; at++) {
		uint8_t before = data[at];

		for (unsigned value = 0; value < 256; value++) {
			data[at] = (uint8_t)value;
			try(data, size);
		}
		data[at] = before;
	}
}

static void change_length(uint8_t *data, size_t size, size_t at)
{
	uint8_t before[2] = { data[at], data[at + 1] };

	for (unsigned value = 0; value < 65536; value++) {
		data[at] = (uint8_t)value;
		data[at + 1] = (uint8_t)(value >> 8);
		try(data, size);
	}
	memcpy(data + at, before, 2);
}

/* The length of the message, and of each extension, whichever byte order it is in. */
static void change_every_length(uint8_t *data, size_t size)
{
	change_length(data, size, 1 + 4);
	for (int big = 0; big < 2; big++)
		for (size_t at = 1 + 16; at + 4 <= size;) {
			size_t words = big ? (size_t)(data[at] << 8 | data[at + 1]) : (size_t)(data[at + 1] << 8 | data[at]);

			if (words == 0 || words * 8 > size - at)
				break;
			change_length(data, size, at);
			at += words * 8;
		}
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		FILE *file = fopen(argv[i], "rb");
		uint8_t *data = malloc(65536), *exact;
		size_t size;

		if (!file || !data)
			return 1;
		size = fread(data, 1, 65536, file);
		fclose(file);
		exact = malloc(size ? size : 1);
		if (!exact)
			return 1;
		memcpy(exact, data, size);
		free(data);
		truncate_everywhere(exact, size);
		if (size > 1 + 16) {
			change_every_byte(exact, size);
			change_every_length(exact, size);
		}
		free(exact);
	}
	printf("%llu mutations of %d messages\n", runs, argc - 1);
	return 0;
}
