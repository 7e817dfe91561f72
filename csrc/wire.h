/* Reading and writing the bytes of a message in either byte order, aligned or not. */
#ifndef PFK_WIRE_H
#define PFK_WIRE_H

#include "pfk.h"

#define PFK_HEADER 16u
#define PFK_WORD 8u
#define PFK_SOCKADDR_IN 16u
#define PFK_SOCKADDR_IN6 28u
#define PFK_COMBINATION 72u	/* sizeof(struct sadb_comb) */
#define PFK_SASTAT_ENTRY 40u	/* sizeof(struct sastat), macOS */

static inline uint16_t get16(const struct pfk_abi *abi, const uint8_t *p)
{
	return abi->big_endian ? (uint16_t)(p[0] << 8 | p[1]) : (uint16_t)(p[1] << 8 | p[0]);
}

static inline uint32_t get32_big(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline uint32_t get32_little(const uint8_t *p)
{
	return (uint32_t)p[3] << 24 | (uint32_t)p[2] << 16 | (uint32_t)p[1] << 8 | p[0];
}

static inline uint32_t get32(const struct pfk_abi *abi, const uint8_t *p)
{
	return abi->big_endian ? get32_big(p) : get32_little(p);
}

static inline uint64_t get64(const struct pfk_abi *abi, const uint8_t *p)
{
	return abi->big_endian ? (uint64_t)get32_big(p) << 32 | get32_big(p + 4)
			       : (uint64_t)get32_little(p + 4) << 32 | get32_little(p);
}

static inline uint16_t get16_network(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static inline void put16_network(uint8_t *p, uint16_t value)
{
	p[0] = (uint8_t)(value >> 8);
	p[1] = (uint8_t)value;
}

static inline void put32_network(uint8_t *p, uint32_t value)
{
	put16_network(p, (uint16_t)(value >> 16));
	put16_network(p + 2, (uint16_t)value);
}

static inline void put16(const struct pfk_abi *abi, uint8_t *p, uint16_t value)
{
	p[abi->big_endian ? 0 : 1] = (uint8_t)(value >> 8);
	p[abi->big_endian ? 1 : 0] = (uint8_t)value;
}

static inline void put32(const struct pfk_abi *abi, uint8_t *p, uint32_t value)
{
	put16(abi, p + (abi->big_endian ? 0 : 2), (uint16_t)(value >> 16));
	put16(abi, p + (abi->big_endian ? 2 : 0), (uint16_t)value);
}

static inline void put64(const struct pfk_abi *abi, uint8_t *p, uint64_t value)
{
	put32(abi, p + (abi->big_endian ? 0 : 4), (uint32_t)(value >> 32));
	put32(abi, p + (abi->big_endian ? 4 : 0), (uint32_t)value);
}

#endif
